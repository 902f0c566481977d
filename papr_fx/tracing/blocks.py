"""The repeated blocks of a model's trunk, read from its module tree, and where a traced graph calls them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable

from torch import fx, nn

from .graphs import shape_of

Family = tuple[str, type[nn.Module]]


def find_blocks(model: nn.Module, unused: Collection[str] = ()) -> list[str]:
    """Qualified names of the trunk's blocks, in order: the largest family of composite modules of one class under one parent.

    In a list, composite modules of other classes belong to the family too. So do families of as many members beside it, such
    as attentions and MLPs in lists of their own. Where nothing is repeated, the blocks are the model's composite children.

    Args:
        model: The model.
        unused: Names of modules that are known not to run. They are no blocks.
    """
    families: dict[Family, list[str]] = defaultdict(list)
    sizes: dict[Family, int] = defaultdict(int)
    lists: dict[str, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for child_name, child in parent._modules.items():  # named_children() skips a child that is listed twice
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
    beside = [key for key in repeated if len(families[key]) == len(chosen) > 1 and not _inside_any(key[0], chosen)]
    members = {*chosen, *(name for key in beside for name in families[key])}
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name in members]


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is the qualified name of `module` or of something in it."""
    return f"{name}.".startswith(f"{module}.")


def ancestors_of(names: Iterable[str]) -> set[str]:
    """Qualified names of every module that contains one of `names`, without the model itself."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}


def block_of(node: fx.Node, blocks: Collection[str]) -> str | None:
    """The block in whose forward a node was recorded."""
    return next((block for block in blocks for name in node.meta["inside"] if is_inside(name, block)), None)


def block_calls(graph: fx.Graph, blocks: Collection[str]) -> list[tuple[str, list[fx.Node]]]:
    """The calls of blocks in order, each with its nodes: one if the block is whole, many if it was traced through."""
    found: list[tuple[str, list[fx.Node]]] = []
    before = None
    for node in graph.nodes:
        name = block_of(node, blocks)
        if name is None and node.op == "call_module" and any(is_inside(block, str(node.target)) for block in blocks):
            name = str(node.target)  # a whole module around blocks
        if name is not None and (name != before or node.target == name):
            found.append((name, []))
        if name is not None:
            found[-1][1].append(node)
        before = name
    return found


def last_tokens(graph: fx.Graph, stream: fx.Node, blocks: Collection[str]) -> fx.Node:
    """The tokens that the last block returns: the last value with the shape of `stream` that a block computes."""
    shape = shape_of(stream)
    for node in reversed(graph.nodes):
        source = node.all_input_nodes[0] if node.target is operator.getitem else node  # a block may return a tuple
        if shape_of(node) == shape and (source.target in blocks or block_of(source, blocks)):
            return node
    return stream


def _inside_any(name: str, blocks: Iterable[str]) -> bool:
    return any(is_inside(name, block) for block in blocks)
