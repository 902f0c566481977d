"""One line of text for each node: what two graphs do not share is visible."""

import operator

import pytest
import torch
from torch import fx

from papr_fx.tracing.text import graph_text


def graph_of(index: object) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.getitem, (x, index)))
    return graph


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (slice(None, 4), ":4"),
        (slice(1, None, 2), "1::2"),
        (slice(None, None, -1), "::-1"),
        ((slice(None), slice(0, 8, 2), None), "(:, 0:8:2, None)"),
        ((Ellipsis, slice(None, None, None)), "(Ellipsis, :)"),
    ],
)
def test_slices(index, text):
    assert f"operator.getitem(x, {text})" in graph_text(graph_of(index))


def test_a_step_that_is_computed():
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.numel, (x,), name="size")
    graph.output(graph.call_function(operator.getitem, (x, slice(0, size, size))))
    assert "operator.getitem(x, 0:size:size)" in graph_text(graph)
