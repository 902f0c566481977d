"""Which modules are the repeated blocks of a model's trunk: read from its structure, not from class names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from torch import nn

Family = tuple[str, type[nn.Module]]


def find_blocks(model: nn.Module, unused: Collection[str] = ()) -> list[str]:
    """Qualified names of the trunk's blocks, in order: the largest family of composite modules of one class under one parent.

    Modules named in `unused`, which are known not to run, are none.

    In a list, composite modules of other classes belong to the family as well; so do families of as many members beside it
    (attentions and MLPs in lists of their own). Where nothing is repeated, the model's composite children are its blocks.
    """
    families: dict[Family, list[str]] = defaultdict(list)
    sizes: dict[Family, int] = defaultdict(int)
    lists: dict[str, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for child_name, child in parent._modules.items():  # named_children() leaves out what is listed twice
            if child is None or not any(True for _ in child.children()):
                continue
            member = f"{name}.{child_name}" if name else child_name
            if member in unused:
                continue
            families[name, type(child)].append(member)
            sizes[name, type(child)] += sum(p.numel() for p in child.parameters())
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                lists[name].append(member)
    repeated = [key for key, names in families.items() if len(names) > 1 or len(lists.get(key[0], ())) == 1]
    if not repeated:
        return [name for name, child in model.named_children() if any(True for _ in child.children()) and name not in unused]
    winner = max(repeated, key=lambda key: sizes[key])
    chosen = lists.get(winner[0], families[winner])
    beside = [key for key in repeated if len(families[key]) == len(chosen) > 1 and not _inside(key[0], chosen)]
    members = {*chosen, *(name for key in beside for name in families[key])}
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name in members]


def ancestors_of(names: Iterable[str]) -> set[str]:
    """Qualified names of every module that contains one of `names`, the model itself left out."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}


def _inside(name: str, blocks: list[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)
