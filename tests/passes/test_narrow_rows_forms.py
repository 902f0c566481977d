"""`narrow_rows` in forms of attention that it passes, and in those that it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papr_fx.passes import narrow_rows

from .test_narrow_rows import IMAGES, Attention, Before, narrowing


class InPlace(Attention):
    """Near miss: its result is changed in place. Twice is as once, so numbers do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Causal(Attention):
    """A query sees the keys in front of it: the first ones see those of the first rows alone."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Masked(Attention):
    """A mask with an axis of queries, which gets their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(2, 7, 7))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


class Unfused(Masked):
    """The same, written out, with values that two lines read."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + self.mask
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ value


@pytest.mark.parametrize(("kind", "through"), [(InPlace, False), (Causal, True), (Masked, True), (Unfused, True)])
def test_forms_of_attention(kind, through):
    model = Before()
    model.blocks[1].attention = kind()
    found, graph = narrowing(model)
    names = {site.node for site in found.sites if site.narrowed}
    assert ("blocks_1_attention_query" in names) == through
    dense = torch.fx.GraphModule(model, graph)
    expected = dense(IMAGES)
    narrow_rows.rewrite(graph, found)
    rows = torch.fx.GraphModule(model, graph)(IMAGES)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
