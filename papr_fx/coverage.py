"""Which architectures of timm and torchvision can be pruned: each is tried, with the proof on one member of every structure.

Two architectures have one structure if their graphs, opened to the last module, read alike once indices and sizes are
stripped. The smallest member is transformed with random weights and proved; the others are transformed without weights.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version

import timm
import torch
from tabulate import tabulate
from torch import nn

from .errors import ArgumentError, PaprError
from .inputs import example_images
from .report import report
from .trace import trace
from .transform import transform

LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True)
class Architecture:
    """A model that a library builds by name, with random weights.

    Attributes:
        library: "timm" or "torchvision".
        family: Its module in the library.
        name: What the library calls it.
    """

    library: str
    family: str
    name: str

    def create(self) -> nn.Module:
        """Builds it in eval mode, on torch's default device."""
        if self.library == "timm":
            return timm.create_model(self.name).eval()
        from torchvision.models import get_model

        return get_model(self.name, weights=None).eval()

    def images(self, model: nn.Module) -> torch.Tensor:
        """One image of the size that the model states, or torchvision's usual 224."""
        shape = torch.zeros(1, 3, 224, 224) if self.library == "torchvision" else None
        return example_images(model, shape)


@dataclass(frozen=True)
class Structure:
    """What one architecture is beside its sizes.

    Attributes:
        key: Equal for architectures of one structure.
        parameters: Number of its parameters.
        reason: Why it could not be traced, if so.
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
        sites: How many there are.
        positions: Positions of the first site, dense and kept.
        ratio: Multiply-accumulates, dense over pruned, the proposal left out.
        proof: "proved", or the member of the same structure that was.
        reason: Why it is refused.
    """

    architecture: Architecture
    mode: str = ""
    sites: int = 0
    positions: str = ""
    ratio: float = 1.0
    proof: str = ""
    reason: str = ""


def architectures(library: str, patterns: Sequence[str] = ("*",)) -> list[Architecture]:
    """The architectures of a library of which a pattern matches the family or the name.

    Args:
        library: "timm" or "torchvision" (classification models).
        patterns: Shell patterns, such as "eva" or "convnext*".

    Raises:
        ArgumentError: Another library, or nothing matches.
    """
    if library == "timm":
        found = [
            Architecture("timm", family, name) for family in timm.list_modules() for name in timm.list_models(module=family)
        ]
    elif library == "torchvision":
        import torchvision.models as zoo

        names = zoo.list_models(module=zoo)
        found = [Architecture(library, zoo.get_model_builder(name).__module__.rpartition(".")[2], name) for name in names]
    else:
        raise ArgumentError(f"library must be one of {', '.join(LIBRARIES)}, not {library!r}")
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
    with ProcessPoolExecutor(workers, context, _one_thread, max_tasks_per_child=50) as pool:
        groups: dict[str, list[tuple[int, Architecture]]] = defaultdict(list)
        rows: dict[Architecture, Row] = {}
        for architecture, structure in zip(chosen, pool.map(structure_of, chosen), strict=True):
            groups[structure.key].append((structure.parameters, architecture))
            progress(f"traced {architecture.name}")
        first = {key: min(members, key=lambda member: member[0])[1] for key, members in groups.items()}
        for key, row in zip(first, pool.map(_proved, first.values(), [z] * len(first)), strict=True):
            others = [a for _, a in groups[key] if a != row.architecture]
            rows[row.architecture] = row
            progress(f"{row.architecture.name}: {row.mode or 'refused'}, and {len(others)} alike")
            if not row.mode:
                rows |= {a: Row(a, reason=row.reason) for a in others}
                continue
            for other in pool.map(_alike, others, [row] * len(others), [z] * len(others)):
                rows[other.architecture] = other
    return [rows[architecture] for architecture in chosen]


def structure_of(architecture: Architecture) -> Structure:
    """Traces an architecture without weights, every module opened, and strips indices and sizes."""
    with torch.device("meta"):
        model = architecture.create()
    parameters = sum(p.numel() for p in model.parameters())
    try:
        graph = trace(model, architecture.images(model), lambda module, _: any(True for _ in module.children())).graph
    except PaprError as error:
        return Structure(f"{type(model).__name__}: {_stripped(str(error))}", parameters, str(error))
    lines = dict.fromkeys(_stripped(str(node.format_node())) for node in graph.nodes)
    classes = sorted({type(module).__name__ for module in model.modules()})
    return Structure(hashlib.sha256("\n".join([*lines, *classes]).encode()).hexdigest(), parameters)


def transformed(architecture: Architecture, z: float, *, mode: str = "auto", weights: bool) -> Row:
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
            mode=mode,
            verify=weights,  # pyright: ignore[reportArgumentType]
        )
    except PaprError as error:
        return Row(architecture, reason=str(error).splitlines()[0])
    found = report(gm)
    site = found.sites[0]
    return Row(
        architecture,
        found.mode,
        len(found.sites),
        f"{site.dense} -> {site.kept}",
        found.dense_macs / found.pruned_macs,
        "proved" if weights else "",
    )


def table(rows: Iterable[Row]) -> str:
    """One line for each architecture."""
    cells = [
        (
            r.architecture.family,
            r.architecture.name,
            r.mode or "refused",
            r.sites or "",
            r.positions,
            f"{r.ratio:.2f}" if r.mode else "",
            r.proof or r.reason,
        )
        for r in rows
    ]
    headers = ["family", "model", "mode", "sites", "positions", "MAC ratio", "proof, or why not"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


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


def document(rows: Sequence[Row], z: float) -> str:
    """Both tables with what they say, as Markdown."""
    libraries = ", ".join(dict.fromkeys(f"{r.architecture.library} {version(r.architecture.library)}" for r in rows))
    return (
        f"# What is pruned\n\n{libraries}, torch {torch.__version__}; keep ratio {z:g}; written by `make coverage`.\n"
        "A proof on random weights holds for every model of the same structure: the same graph but for sizes and indices.\n\n"
        f"{summary(rows)}\n\n{table(rows)}\n"
    )


def _one_thread() -> None:
    torch.set_num_threads(1)


def _proved(architecture: Architecture, z: float) -> Row:
    return transformed(architecture, z, weights=True)


def _alike(architecture: Architecture, proved: Row, z: float) -> Row:
    row = transformed(architecture, z, mode=proved.mode, weights=False)
    return row if not row.mode else replace(row, proof=f"as {proved.architecture.name}")


def _stripped(line: str) -> str:
    return re.sub(r"\d+", "", line)
