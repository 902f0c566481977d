"""Tries every architecture of a library: one of each structure is proved, the others are transformed without weights.

Two architectures of a family have the same structure if their graphs, traced through all modules, are equal once indices and
sizes are stripped. The smallest of them is transformed with random weights and proved.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..errors import PaprError
from ..planning.modes import PixelPlan
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.trace import trace
from ..transform import transform
from .zoo import Architecture

# A model with more parameters than this is proved with this many blocks.
_LARGE, _FEW_BLOCKS = 100_000_000, 2


@dataclass(frozen=True)
class Structure:
    """What is left of an architecture without its sizes.

    Attributes:
        key: Equal for architectures of the same structure.
        parameters: Number of parameters.
        reason: Why the architecture could not be built; empty if it could.
    """

    key: str
    parameters: int
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """The result for one architecture.

    Attributes:
        architecture: The architecture.
        mode: "tokens" or "pixels"; empty if it is refused.
        output: "logits", or "features" if only `forward_features` can be pruned.
        sites: Number of pruning sites.
        positions: Positions of the first site, dense and kept.
        proof: "proved", or the proved architecture of the same structure.
        reason: Why it is refused.
        narrowed: "yes" or "no": whether rows are left out that nobody reads. Empty for pixels, or if it was not tried.
        bfloat16: "yes" if it runs in bfloat16, or what is wrong. Empty if it was not tried. See `with_columns`.
    """

    architecture: Architecture
    mode: str = ""
    output: str = "logits"
    sites: int = 0
    positions: str = ""
    proof: str = ""
    reason: str = ""
    narrowed: str = ""
    bfloat16: str = ""


def survey(
    chosen: Sequence[Architecture], z: float = 0.5, *, workers: int = 1, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Tries each architecture.

    Args:
        chosen: From `architectures`.
        z: Keep ratio.
        workers: Processes, of one thread each.
        progress: Called with a line for every architecture that is traced, and for every structure that is proved or refused.

    Returns:
        One row per architecture, in order.
    """
    context = multiprocessing.get_context("spawn")
    # Not a ProcessPoolExecutor: it hangs once its workers have been replaced.
    with context.Pool(workers, one_thread, maxtasksperchild=50) as pool:
        structures: dict[Architecture, Structure] = {}
        for architecture, structure in zip(chosen, pool.imap(structure_of, chosen), strict=True):
            structures[architecture] = structure
            progress(f"traced {architecture.name}")
        rows = {a: Row(a, reason=structure.reason) for a, structure in structures.items() if structure.reason}
        groups = _by_structure(structures)
        smallest = [min(members, key=lambda a: structures[a].parameters) for members in groups]
        for members, row in zip(groups, pool.imap(partial(_proved, z=z), smallest), strict=True):
            others = [a for a in members if a != row.architecture]
            progress(f"{row.architecture.name}: {row.mode or 'refused'}, and {len(others)} alike")
            alike = pool.imap(partial(_alike, proved=row, z=z), others)
            rows |= {row.architecture: row} | dict(zip(others, alike, strict=True))
        pool.close()
        pool.join()
    return [rows[architecture] for architecture in chosen]


def _by_structure(structures: Mapping[Architecture, Structure]) -> list[list[Architecture]]:
    """The architectures of a family that have the same structure, in groups; those that could not be built are left out."""
    groups: dict[tuple[str, str], list[Architecture]] = defaultdict(list)
    for architecture, structure in structures.items():
        if not structure.reason:
            groups[architecture.family, structure.key].append(architecture)
    return list(groups.values())


def structure_of(architecture: Architecture) -> Structure:
    """Traces an architecture through all its modules, without weights, and strips indices and sizes."""
    try:
        with torch.device("meta"):
            model = architecture.create()
    except (*MODEL_ERRORS, ImportError, KeyError) as error:  # a package is missing, or a default is None
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
    """Transforms one architecture: with random weights and proved, or without weights and not proved."""
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
    except Exception as error:  # a bug of this project: the survey continues, and shows it
        return Row(architecture, reason=f"failed: {type(error).__name__}: {error}".splitlines()[0])
    plan = gm.plan
    rows = plan.choices(False)[0].rows
    return Row(
        architecture,
        plan.kind,
        output,
        len(plan.eval.sites) if isinstance(plan.eval, PixelPlan) else 1,
        f"{rows.count} -> {rows.kept(z)}",
        "proved" if weights else "",
    )


def one_thread() -> None:
    """How a worker process starts."""
    torch.set_num_threads(1)


def _proved(architecture: Architecture, z: float) -> Row:
    """Transforms and proves an architecture, for its features if its logits are refused."""
    small = _shallow(architecture)
    row = transformed(small, z, weights=True)
    if not row.mode:
        features = transformed(small, z, output="features", weights=True)
        row = features if features.mode == "tokens" else row
    if not row.mode or small is architecture:
        return replace(row, architecture=architecture)
    return _alike(architecture, replace(row, architecture=architecture), z, f"proved with {small.depth} blocks")


def _shallow(architecture: Architecture) -> Architecture:
    """A large architecture with fewer blocks, if that keeps its structure; any other as it is."""
    structure = structure_of(architecture)
    small = replace(architecture, depth=_FEW_BLOCKS)
    if structure.parameters < _LARGE or architecture.library == "torchvision":
        return architecture
    return small if structure_of(small).key == structure.key else architecture


def _alike(architecture: Architecture, proved: Row, z: float, proof: str = "") -> Row:
    """Transforms an architecture whose structure is proved; if that was refused, so is this one."""
    if not proved.mode:
        return Row(architecture, reason=proved.reason)
    row = transformed(architecture, z, mode=proved.mode, output=proved.output, weights=False)
    return row if not row.mode else replace(row, proof=proof or f"as {proved.architecture.name}")


def _stripped(line: str) -> str:
    return re.sub(r"\d+", "", line)
