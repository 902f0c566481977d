"""How nodes are tried on random numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from papr_fx.dataflow.arguments import Argument, Rows
from papr_fx.dataflow.row_probe import RowProbe, _Checked


def test_attentions_compare_their_lengths():
    """PyTorch's fused attention on a CPU reads on behind keys that are fewer than the values."""
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    with _Checked():
        F.scaled_dot_product_attention(query[:, :, :1], key, value, dropout_p=1.0)
        with pytest.raises(ValueError, match="not as many keys as values"):
            F.scaled_dot_product_attention(query, key[:, :, :1], value)


def node_of(function, *shapes):
    """A node that calls a function on values of these shapes."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    node = graph.call_function(function, tuple(inputs))
    with_shapes = [*zip(inputs, shapes, strict=True), (node, tuple(function(*map(torch.empty, shapes)).shape))]
    for value, shape in with_shapes:
        value.meta |= {"shape": shape, "dtype": torch.float32}
    return node


ROWS = Rows(1, 7)


@pytest.mark.parametrize(
    ("function", "shapes", "axis", "arguments"),
    [
        (torch.add, ((2, 7, 3), (2, 7, 3)), -2, (Argument(0, -2), Argument(1, -2))),
        (torch.add, ((2, 7, 3), (1, 1, 3)), -2, (Argument(0, -2),)),
        (torch.add, ((2, 7, 3), (7, 3)), -2, (Argument(0, -2), Argument(1, -2))),
        (torch.matmul, ((2, 7, 7), (2, 7, 3)), -2, (Argument(0, -2),)),
        (F.scaled_dot_product_attention, ((2, 2, 7, 3),) * 3, -2, (Argument(0, -2),)),
        (F.dropout, ((2, 7, 3),), -2, (Argument(0, -2),)),
        (lambda x: x.cumsum(1)[:, -1], ((2, 7, 3),), None, ()),
        (torch.rand_like, ((2, 7, 3),), -2, ()),
        (lambda x: x.softmax(1), ((2, 7, 3),), -2, ()),
        (lambda x: x + torch.arange(7).view(7, 1), ((2, 7, 3),), -2, ()),
        (lambda x: x[:, 0], ((2, 7, 3),), None, (Argument(0, -2),)),
        (lambda x: x[:, 1], ((2, 7, 3),), None, ()),
        (lambda x: x.mean(1), ((2, 7, 3),), None, ()),
    ],
)
def test_what_rows_are_enough_for(function, shapes, axis, arguments):
    assert RowProbe(nn.Module(), ROWS).trial(node_of(function, *shapes), axis).arguments == arguments
