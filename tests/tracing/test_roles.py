"""Roles: what the nodes that passes insert are for."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import papr_fx
from papr_fx.passes.kinds import Kind
from papr_fx.tracing.graphs import same_graph
from papr_fx.tracing.roles import find, find_all, has_role, tag

from ..models import Shape, ToyViT, toy_proposal


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) * (x + 2)


def tagged() -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.symbolic_trace(Summed()).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    tag(nodes[0], Kind.KEEP, 1)
    tag(nodes[1], Kind.KEEP)
    return graph, nodes


def test_a_node_is_found_by_kind_and_number():
    graph, nodes = tagged()
    assert find(graph, Kind.KEEP) is nodes[1]
    assert find(graph, Kind.KEEP, 1) is nodes[0]
    assert find_all(graph, Kind.KEEP) == [nodes[0], nodes[1]]
    assert not has_role(nodes[0], Kind.PSM)
    with pytest.raises(LookupError, match="number 2"):
        find(graph, Kind.KEEP, 2)


def test_copies_of_a_graph_keep_roles():
    graph, nodes = tagged()
    assert find(copy.deepcopy(graph), Kind.KEEP, 1).name == nodes[0].name


class Named(ToyViT):
    """A user's submodule and value that are called as the nodes of a rewrite are."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.papr_keep, self.papr_tokens = nn.Identity(), nn.Identity()

    def tokens(self, x: Tensor) -> Tensor:
        return self.papr_tokens(self.papr_keep(super().tokens(x)))


def test_a_model_may_use_the_names_of_inserted_nodes():
    model = Named().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    plain = ToyViT(Shape()).eval()
    plain.load_state_dict(model.state_dict())
    expected = papr_fx.transform(plain, toy_proposal(), 0.5)
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(gm(x), expected(x))
    assert torch.equal(*[next(iter(papr_fx.keep_masks(module, x).values())) for module in (gm, expected)])


def test_graphs_are_equal_by_names_targets_arguments_and_shapes():
    graph, other = (fx.symbolic_trace(Summed()).graph for _ in range(2))
    assert same_graph(graph, other)
    nodes = [node for node in other.nodes if node.op == "call_function"]
    nodes[0].meta["shape"] = (1,)
    assert not same_graph(graph, other)
    del nodes[0].meta["shape"]
    nodes[0].args = (nodes[0].args[0], 3)
    assert not same_graph(graph, other)
