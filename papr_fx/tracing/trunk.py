"""The trunk of a model: the repeated blocks through which its tokens run.

It is found by what runs. The model runs once on an image, and each composite module (a module of modules) that maps tokens
(B, N, C) to as many is noted. So a wrapper, a head, a decoder or a part that does not run is not taken for the trunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import digits

import torch
from torch import Tensor, nn

from ..versions import tree_leaves
from .blocks import is_inside
from .fakes import MODEL_ERRORS, scratch_copy
from .flattened import is_holder
from .numerics import forked_random


@dataclass(frozen=True)
class Trunk:
    """Repeated blocks.

    Attributes:
        blocks: Qualified names of the blocks, in the order of the module tree.
        others: Other repeated blocks that map tokens to tokens: those of a decoder, or of another trunk.
        spatial: What the first block maps to what, where no block returns tokens because positions keep their grid.
    """

    blocks: tuple[str, ...]
    others: tuple[tuple[str, ...], ...] = ()
    spatial: str = ""


@dataclass
class _Calls:
    """The calls of one module.

    Attributes:
        order: When the first one began.
        tokens: The tokens N of each call that maps tokens to as many.
        keeps_grid: Whether one maps a value with a grid, such as (B, H, W, C), to one of the same shape.
        maps: Shapes that the last one takes, and the shape of the first tensor that it returns.
    """

    order: int
    tokens: list[int] = field(default_factory=list)
    keeps_grid: bool = False
    maps: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True)
class _Family:
    """Composite modules under one parent: all those in a list, otherwise those of one class, or numbered alike.

    Attributes:
        members: Their qualified names.
        calls: How often they map tokens to as many.
        listed: Whether they are in a list.
        order: When the first of them first runs.
        tokens: The most tokens that one of them takes.
        cost: Multiply-accumulates of their layers on tokens, about. Where they take none, their parameters.
    """

    members: tuple[str, ...]
    calls: int
    listed: bool
    order: int
    tokens: int
    cost: int

    def is_apart(self, other: _Family) -> bool:
        """Whether neither lies in the other."""
        pairs = [(a, b) for a in self.members for b in other.members]
        return not any(is_inside(a, b) or is_inside(b, a) for a, b in pairs)


def find_trunk(model: nn.Module, images: Tensor) -> Trunk:
    """Finds the trunk: the family of blocks that is the first to run on as many tokens as the most expensive one.

    Families of as many members beside it belong to it, such as attentions and MLPs in lists of their own. So do those whose
    blocks are like its own, such as the rest of a trunk that is held in several lists. Where no block is repeated, one block
    will do. Where no block maps tokens to tokens, the largest family is returned: an MLP that takes tokens
    inside a block that keeps a grid, as in Swin, is no block.

    The run is a real one, before the model is traced: code that caches tensors by size must not cache fake ones.

    Args:
        model: The model. It is not changed.
        images: Images such as it takes. Only shape, dtype and device matter.
    """
    calls = _calls(model, images)
    families = list(_families(model, calls))
    spatial = [name for name, module in model.named_modules() if module in calls and calls[module].keeps_grid]
    on_tokens = [f for f in families if f.calls and not any(is_inside(f.members[0], name) for name in spatial)]
    candidates = [f for f in on_tokens if f.calls > 1] or [f for f in on_tokens if f.listed] or on_tokens
    if not candidates:
        blocks = _largest(model, families)
        return Trunk(blocks, spatial=_spatial({name: calls.get(model.get_submodule(name)) for name in blocks}))
    heaviest = max(candidates, key=lambda family: family.cost)
    as_many = [f for f in candidates if f is heaviest or (f.tokens == heaviest.tokens and f.is_apart(heaviest))]
    chosen = min(as_many, key=lambda family: family.order)
    others = [family for family in candidates if family.is_apart(chosen)]
    as_long = [f for f in on_tokens if f.tokens == chosen.tokens and f.is_apart(chosen)]
    alike = [f for f in as_long if _are_alike(*(model.get_submodule(family.members[0]) for family in (f, chosen)))]
    same = alike + [f for f in others if f in as_long and f not in alike and len(f.members) == len(chosen.members) > 1]
    return Trunk(
        _in_order(model, [name for family in (chosen, *same) for name in family.members]),
        tuple(family.members for family in others if family not in same and len(family.members) > 1),
    )


def _calls(model: nn.Module, images: Tensor) -> dict[nn.Module, _Calls]:
    """How the modules of `model` are called for one image. Of a model that does not run, as far as it does."""
    found: dict[nn.Module, _Calls] = {}
    copied = scratch_copy(model).eval()
    held = {child for module in model.modules() if is_holder(module) for child in module.children()}
    for module, watched in zip(model.modules(), copied.modules(), strict=True):
        if (_is_composite(module) or module in held) and not isinstance(watched, torch.jit.ScriptModule):
            _watch(watched, module, found)
    with torch.no_grad(), forked_random(images):
        try:
            copied(images[:1])
        except torch.OutOfMemoryError:  # says nothing about the model
            raise
        except MODEL_ERRORS:  # tracing meets the same error, and names its node
            pass
    for module in [child for parent in model.modules() if isinstance(parent, nn.ModuleList) for child in parent.children()]:
        parts = [found[part] for part in module.children() if part in found]
        if isinstance(module, nn.ModuleList) and parts:  # a block in parts, which the model itself puts together
            found[module] = _Calls(min(part.order for part in parts), [count for part in parts for count in part.tokens])
    for module in reversed([module for module in model.modules() if is_holder(module) and not _is_list(module)]):
        parts = sorted((found[part] for part in module.children() if part in found), key=lambda part: part.order)
        if parts:
            found[module] = _held(parts)
    return found


def _held(parts: Sequence[_Calls]) -> _Calls:
    """The calls of a module whose forward is gone: it takes what its first part takes, and returns what its last does."""
    given, returned = parts[0].maps[0], parts[-1].maps[1]
    alike = given[:1] == (returned,)
    tokens = min((part.tokens for part in parts if part.tokens), key=len, default=[])
    on_tokens = alike and len(returned) == 3
    return _Calls(parts[0].order, tokens if on_tokens else [], len(returned) > 3, (given, returned))


def _watch(watched: nn.Module, module: nn.Module, found: dict[nn.Module, _Calls]) -> None:
    """Notes the calls of `watched`, which is a copy of `module`."""

    def begin(_: nn.Module, args: object) -> None:
        found.setdefault(module, _Calls(len(found)))

    def end(_: nn.Module, args: object, kwargs: object, result: object) -> None:
        value = next(iter(tree_leaves(result)), None)  # a block may return more after its tokens
        if isinstance(value, Tensor):
            given = [tuple(tensor.shape) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            found[module].maps = tuple(given), tuple(value.shape)
        if not isinstance(value, Tensor) or value.ndim < 3 or 1 not in value.shape[: 2 if value.ndim == 3 else 1]:
            return
        if any(isinstance(given, Tensor) and given.shape == value.shape for given in tree_leaves((args, kwargs))):
            if value.ndim == 3:
                found[module].tokens.append(max(value.shape[:2]))  # (B, N, C), or (N, B, C), of one image
            else:
                found[module].keeps_grid = True

    watched.register_forward_pre_hook(begin)
    watched.register_forward_hook(end, with_kwargs=True)


def _families(model: nn.Module, calls: Mapping[nn.Module, _Calls]) -> Iterator[_Family]:
    """The families of a model. A module that runs, but never on tokens, is left out of a family whose others do."""
    for name, parent in model.named_modules():
        listed = isinstance(parent, nn.ModuleList | nn.Sequential) or _is_list(parent)
        groups: dict[object, dict[str, nn.Module]] = defaultdict(dict)
        for child_name, child in parent._modules.items():  # named_children() skips a child that is listed twice
            if child is not None and _is_composite(child):
                kind = child_name.rstrip(digits) if is_holder(child) else type(child)
                groups[None if listed else kind][f"{name}.{child_name}" if name else child_name] = child
        for group in groups.values():
            on_tokens = {member: child for member, child in group.items() if child in calls and calls[child].tokens}
            yield _family(on_tokens or group, calls, listed=listed)


def _family(members: Mapping[str, nn.Module], calls: Mapping[nn.Module, _Calls], *, listed: bool) -> _Family:
    known = {module: calls[module] for module in members.values() if module in calls}
    tokens = {module: call.tokens for module, call in known.items() if call.tokens}
    sizes = {module: sum(p.numel() for p in module.parameters()) for module in members.values()}
    return _Family(
        members=tuple(members),
        calls=sum(len(counts) for counts in tokens.values()),
        listed=listed,
        order=min((call.order for call in known.values()), default=len(calls)),
        tokens=max((max(counts) for counts in tokens.values()), default=0),
        cost=sum(sum(counts) * sizes[module] for module, counts in tokens.items()) or sum(sizes.values()),
    )


def _are_alike(block: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks are of one class and size. One may hold more than the other, such as a convolution of its own."""
    shapes, others = ({name: p.shape for name, p in module.named_parameters()} for module in (block, other))
    common = shapes.keys() & others.keys()
    return type(block) is type(other) and bool(common) and all(shapes[name] == others[name] for name in common)


def _largest(model: nn.Module, families: Collection[_Family]) -> tuple[str, ...]:
    """The blocks of a model in which none maps tokens to tokens."""
    repeated = [family for family in families if len(family.members) > 1] or [f for f in families if f.listed]
    if not repeated:
        return tuple(name for name, child in model.named_children() if _is_composite(child))
    return _in_order(model, max(repeated, key=lambda family: family.cost).members)


def _spatial(calls: Mapping[str, _Calls | None]) -> str:
    """What the first of these blocks maps to what, if all that run return values with a grid."""
    maps = [(name, *call.maps) for name, call in calls.items() if call is not None]
    if not maps or any(len(returned) < 4 for _, _, returned in maps):
        return ""
    name, given, returned = maps[0]
    return f"`{name}` maps {', '.join(map(str, given))} to {returned}"


def _in_order(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name in names)


def _is_list(module: nn.Module) -> bool:
    """Whether a module that only holds others numbers them."""
    return is_holder(module) and all(name.isdecimal() for name, _ in module.named_children())


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children())
