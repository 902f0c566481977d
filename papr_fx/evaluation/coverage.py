"""Which architectures of timm, torchvision and transformers can be pruned: each is tried, one of every structure is proved.

Two architectures of a family have one structure if their graphs, opened to the last module, read alike once indices and sizes
are stripped. The smallest member is transformed with random weights and proved; the others are transformed without weights.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from math import prod
from typing import Any, cast

import timm
import torch
from tabulate import tabulate
from torch import nn

from ..errors import ArgumentError, PaprError
from ..ops.positions import keep_count
from ..planning.inputs import example_images
from ..planning.plan import Pixels
from ..proposals.network import takes_clips
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.trace import trace
from ..transform import transform

# The families that are tried unless others are asked for: transformers and the networks that took their shape.
FAMILIES = {
    "timm": (
        *("vision_transformer", "vision_transformer_relpos", "vision_transformer_hybrid", "eva", "beit", "deit", "cait"),
        *("naflexvit", "convit", "qwen3_vit", "gemma4_vit", "deepseek_vit"),
        *("convnext", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "metaformer", "maxxvit", "focalnet"),
        *("davit", "xcit", "pvt_v2", "volo", "hiera", "mvitv2", "inception_next", "mambaout", "edgenext", "gcvit", "nest"),
        *("vitamin", "vision_transformer_sam"),
    ),
    "torchvision": ("vision_transformer", "swin_transformer", "convnext", "maxvit", "video.swin_transformer", "video.mvit"),
    "transformers": (
        *("aimv2", "beit", "chinese_clip", "clip", "convnext", "convnextv2", "cvt", "data2vec_vision", "deit", "dinov2"),
        *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "donut_swin", "focalnet", "hiera", "ijepa", "internvl"),
        *("levit", "metaclip_2", "mlcd", "mobilevit", "mobilevitv2", "pixio", "poolformer", "pvt", "pvt_v2", "segformer"),
        *("siglip", "siglip2", "swiftformer", "swin", "swinv2", "timesformer", "tipsv2", "videomae", "vit", "vit_msn"),
        *("vitdet", "vivit", "vjepa2"),
    ),
}
LIBRARIES = tuple(FAMILIES)

# A model of more parameters is proved with so many blocks.
_LARGE, _FEW_BLOCKS = 100_000_000, 2


@dataclass(frozen=True)
class Architecture:
    """A model that a library builds by name, with random weights.

    Attributes:
        library: One of `LIBRARIES`.
        family: Its module in the library.
        name: What the library calls it; of transformers, the class, in its default configuration.
        depth: Number of blocks, if another than its own: `depth` of timm's builders, `num_hidden_layers` of transformers.
    """

    library: str
    family: str
    name: str
    depth: int | None = None

    def create(self) -> nn.Module:
        """Builds it in eval mode, on torch's default device."""
        if self.library == "timm":
            options: dict[str, Any] = {} if self.depth is None else {"depth": self.depth}
            return timm.create_model(self.name, **options).eval()
        if self.library == "transformers":
            import transformers

            kind = getattr(transformers, self.name)
            options = {} if self.depth is None else {"num_hidden_layers": self.depth}
            return kind._from_config(kind.config_class(**options)).eval()
        from torchvision.models import get_model

        return get_model(self.name, weights=None).eval()

    def images(self, model: nn.Module) -> torch.Tensor:
        """One image or clip of the size that the model states, or the usual 224 pixels and 16 frames."""
        try:
            return example_images(model, None)
        except ArgumentError:
            return example_images(model, torch.zeros(1, 3, *[16] * takes_clips(model), 224, 224))


@dataclass(frozen=True)
class Structure:
    """What one architecture is beside its sizes.

    Attributes:
        key: Equal for architectures of one structure.
        parameters: Number of its parameters.
        reason: Why it could not be built, if so.
    """

    key: str
    parameters: int
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        architecture: Which.
        mode: "tokens", "pixels", or nothing where it is refused.
        output: "logits", or "features" where only `forward_features` can be pruned.
        sites: How many there are.
        positions: Positions of the first site, dense and kept.
        proof: "proved", or the member of the same structure that was.
        reason: Why it is refused.
    """

    architecture: Architecture
    mode: str = ""
    output: str = "logits"
    sites: int = 0
    positions: str = ""
    proof: str = ""
    reason: str = ""


def architectures(library: str, patterns: Sequence[str] = ()) -> list[Architecture]:
    """The architectures of a library of which a pattern matches the family or the name.

    Args:
        library: "timm", "torchvision" (classification models, of clips too) or "transformers" (those, vision towers and
            backbones, each in its default configuration).
        patterns: Shell patterns, such as "eva" or "convnext*"; none for `FAMILIES`.

    Raises:
        ArgumentError: Another library, or nothing matches.
    """
    if library == "timm":
        found = [
            Architecture("timm", family, name) for family in timm.list_modules() for name in timm.list_models(module=family)
        ]
    elif library == "torchvision":
        import torchvision.models as zoo

        builders = {name: zoo.get_model_builder(name) for kind in (zoo, zoo.video) for name in zoo.list_models(module=kind)}
        found = [Architecture(library, build.__module__.removeprefix(f"{zoo.__name__}."), n) for n, build in builders.items()]
    elif library == "transformers":
        found = [Architecture(library, _family(kind), kind.__name__) for kind in _transformers_classes()]
    else:
        raise ArgumentError(f"library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    patterns = patterns or FAMILIES[library]
    chosen = [a for a in found if any(fnmatch(a.name, pattern) or fnmatch(a.family, pattern) for pattern in patterns)]
    if not chosen:
        raise ArgumentError(f"{library} has no model or family that matches {' or '.join(map(repr, patterns))}")
    return chosen


def survey(
    chosen: Sequence[Architecture], z: float = 0.5, *, workers: int = 1, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Tries each architecture.

    Args:
        chosen: From `architectures`.
        z: Keep ratio.
        workers: Processes to run, of one thread each.
        progress: Called with a line whenever a structure is done.

    Returns:
        One row for each, in order.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _one_thread, maxtasksperchild=50) as pool:  # an executor hangs once its workers were replaced
        groups: dict[tuple[str, str], list[tuple[int, Architecture]]] = defaultdict(list)
        rows: dict[Architecture, Row] = {}
        for architecture, structure in zip(chosen, pool.imap(structure_of, chosen), strict=True):
            if structure.reason:
                rows[architecture] = Row(architecture, reason=structure.reason)
            else:
                groups[architecture.family, structure.key].append((structure.parameters, architecture))
            progress(f"traced {architecture.name}")
        first = {key: min(members, key=lambda member: member[0])[1] for key, members in groups.items()}
        for key, row in zip(first, pool.imap(partial(_proved, z=z), first.values()), strict=True):
            others = [a for _, a in groups[key] if a != row.architecture]
            rows[row.architecture] = row
            progress(f"{row.architecture.name}: {row.mode or 'refused'}, and {len(others)} alike")
            if not row.mode:
                rows |= {a: Row(a, reason=row.reason) for a in others}
                continue
            for other in pool.imap(partial(_alike, proved=row, z=z), others):
                rows[other.architecture] = other
        pool.close()
        pool.join()
    return [rows[architecture] for architecture in chosen]


def structure_of(architecture: Architecture) -> Structure:
    """Traces an architecture without weights, every module opened, and strips indices and sizes."""
    try:
        with torch.device("meta"):
            model = architecture.create()
    except (*MODEL_ERRORS, ImportError, KeyError) as error:  # another package is missing, or a default is none
        return Structure(architecture.name, 0, f"cannot be built: {type(error).__name__}: {str(error).strip()}".splitlines()[0])
    parameters = sum(p.numel() for p in model.parameters())
    try:
        graph = trace(model, architecture.images(model), lambda module, _: any(True for _ in module.children())).graph
    except PaprError as error:
        return Structure(f"{type(model).__name__}: {_stripped(str(error))}", parameters)
    lines = dict.fromkeys(_stripped(str(node.format_node())) for node in graph.nodes)
    classes = sorted({type(module).__name__ for module in model.modules()})
    return Structure(hashlib.sha256("\n".join([*lines, *classes]).encode()).hexdigest(), parameters)


def transformed(architecture: Architecture, z: float, *, mode: str = "auto", output: str = "logits", weights: bool) -> Row:
    """Transforms one architecture: proved on random weights, or without weights and unproved."""
    torch.manual_seed(0)
    with torch.device("cpu" if weights else "meta"):
        model = architecture.create()
    proposal = nn.Conv2d(3, 1, 16, 16)  # any map will do
    try:
        gm = transform(
            model,
            proposal,
            z,
            example_input=architecture.images(model),
            mode=cast(Any, mode),
            output=cast(Any, output),
            verify=weights,
        )
    except PaprError as error:
        return Row(architecture, reason=" ".join(str(error).splitlines()))
    except Exception as error:  # a fault of this project: the survey goes on, and shows it
        return Row(architecture, reason=f"failed: {type(error).__name__}: {error}".splitlines()[0])
    plan = gm.plan
    choice = plan.choices(False)[0]
    patches = prod(choice.grid)
    return Row(
        architecture,
        plan.operator.mode,
        output,
        len(plan.operator.sites[False]) if isinstance(plan.operator, Pixels) else 1,
        f"{choice.prefix + patches} -> {choice.prefix + keep_count(patches, z, choice.prefix)}",
        "proved" if weights else "",
    )


def table(rows: Iterable[Row]) -> str:
    """One line for each architecture; reasons for refusals are numbered below it."""
    reasons: dict[str, str] = {}
    cells = [
        (
            r.architecture.family,
            r.architecture.name,
            (r.mode or "refused") + (" (features)" if r.output == "features" else ""),
            r.sites or "",
            r.positions,
            r.proof if r.mode else reasons.setdefault(r.reason, f"reason {len(reasons) + 1}"),
        )
        for r in rows
    ]
    headers = ["family", "model", "mode", "sites", "positions", "proof"]
    lines = tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n".join([lines, "", *(f"{number}: {text}.  " for text, number in reasons.items())]).rstrip()


def summary(rows: Iterable[Row]) -> str:
    """One line for each family: how many of its models are pruned by tokens, by pixels, or refused."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for family in (row.architecture.family, "all"):
            counts[family][row.mode or "refused"] += 1
    ordered = [*(family for family in counts if family != "all"), "all"]
    cells = [
        (family, counts[family].total(), *(counts[family][mode] for mode in ("tokens", "pixels", "refused")))
        for family in ordered
    ]
    return tabulate(cells, headers=["family", "models", "tokens", "pixels", "refused"], tablefmt="github")


def tables(rows: Sequence[Row]) -> str:
    """Summary and table of each library."""
    libraries = dict.fromkeys(row.architecture.library for row in rows)
    chosen = {library: [row for row in rows if row.architecture.library == library] for library in libraries}
    return "\n\n".join(f"## {name} {version(name)}\n\n{summary(some)}\n\n{table(some)}" for name, some in chosen.items())


def document(rows: Sequence[Row], z: float) -> str:
    """The tables with what they say, as Markdown; families of the default selection that are not among `rows` are named."""
    tried = {(row.architecture.library, row.architecture.family) for row in rows}
    every = dict.fromkeys((a.library, a.family) for library in LIBRARIES for a in architectures(library))
    missing = [f"{family} ({library})" for library, family in every if (library, family) not in tried]
    return (
        f"# What is pruned\n\ntorch {torch.__version__}; keep ratio {z:g}; written by `make coverage`.\n\n"
        "Every architecture is built with random weights and transformed. Architectures of a family whose graphs, all modules "
        "traced through, differ\nin sizes and indices only have one structure. The smallest of each is proved on numbers (with "
        "two blocks where it has more than 100 M\nparameters and its structure allows), the others are transformed without "
        "weights; where the smallest is refused, so are they.\n\n"
        f"Not tried: {', '.join(missing) or 'none'}.\n\n{tables(rows)}\n"
    )


def _one_thread() -> None:
    torch.set_num_threads(1)


def _proved(architecture: Architecture, z: float) -> Row:
    small = _shallow(architecture)
    row = transformed(small, z, weights=True)
    if not row.mode:
        features = transformed(small, z, output="features", weights=True)
        row = features if features.mode == "tokens" else row
    if not row.mode or small is architecture:
        return replace(row, architecture=architecture)
    return _alike(architecture, replace(row, architecture=architecture), z, f"proved with {small.depth} blocks")


def _shallow(architecture: Architecture) -> Architecture:
    """A large architecture with fewer blocks, if that has its structure."""
    structure = structure_of(architecture)
    small = replace(architecture, depth=_FEW_BLOCKS)
    if structure.parameters < _LARGE or architecture.library == "torchvision":
        return architecture
    return small if structure_of(small).key == structure.key else architecture


def _alike(architecture: Architecture, proved: Row, z: float, proof: str = "") -> Row:
    row = transformed(architecture, z, mode=proved.mode, output=proved.output, weights=False)
    return row if not row.mode else replace(row, proof=proof or f"as {proved.architecture.name}")


def _family(kind: type[nn.Module]) -> str:
    return kind.__module__.rpartition(".")[2].removeprefix("modeling_")


def _transformers_classes() -> list[type[nn.Module]]:
    """Classes whose input is an image or a clip: classification models, vision towers, and what backbones are made of."""
    import transformers
    from transformers.models.auto import modeling_auto

    models = {key: names if isinstance(names, tuple) else (names,) for key, names in modeling_auto.MODEL_MAPPING_NAMES.items()}
    chosen: list[str] = []
    images, clips = (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    )
    for names in (*images.values(), *clips.values()):
        chosen += names if isinstance(names, tuple) else (names,)
    chosen += [name for names in models.values() for name in names if name.endswith("VisionModel")]
    chosen += [name for key in modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES for name in models.get(key, ())]
    kinds = [getattr(transformers, name) for name in dict.fromkeys(chosen)]
    return sorted(
        (kind for kind in kinds if kind.main_input_name in ("pixel_values", "pixel_values_videos")),
        key=lambda kind: (_family(kind), kind.__name__),
    )


def _stripped(line: str) -> str:
    return re.sub(r"\d+", "", line)
