"""Which modules are the repeated blocks of a model's trunk: read from its structure, not from class names."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

Signature = tuple[type[nn.Module], tuple[tuple[int, ...], ...]]


def find_blocks(model: nn.Module) -> list[str]:
    """Qualified names of the trunk's blocks, in order: the largest family of alike composite modules under one parent.

    Modules are alike if class and parameter shapes agree. A list container with one member is a family as well.
    """
    families: dict[tuple[str, Signature], list[str]] = defaultdict(list)
    sizes: dict[tuple[str, Signature], int] = defaultdict(int)
    lone: set[tuple[str, Signature]] = set()
    for name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            shapes = tuple(tuple(p.shape) for p in child.parameters())
            if not shapes or not any(True for _ in child.children()):
                continue
            key = name, (type(child), shapes)
            families[key].append(f"{name}.{child_name}" if name else child_name)
            sizes[key] += sum(p.numel() for p in child.parameters())
            if isinstance(parent, nn.ModuleList | nn.Sequential) and len(parent) == 1:
                lone.add(key)
    repeated = [key for key, names in families.items() if len(names) > 1 or key in lone]
    return families[max(repeated, key=lambda key: sizes[key])] if repeated else []


def ancestors_of(names: list[str]) -> set[str]:
    """Qualified names of every module that contains one of `names`, the model itself left out."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
