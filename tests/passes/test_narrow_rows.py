"""`narrow_rows` as it is specified: the graph before, the graph expected, and near misses."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papr_fx.passes import narrow_rows, prune_tokens
from papr_fx.passes.narrow_rows import Narrowing
from papr_fx.tracing.fakes import scratch_copy
from papr_fx.tracing.trace import OpenError, trace

from ..models import enliven
from .specification import assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 6)
BLOCKS = ("blocks.0", "blocks.1")


class Attention(nn.Module):
    """Attention of two heads, queries, keys and values in layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(6, 6) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, 3).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        mixed = self.attend(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 6))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.layer = nn.LayerNorm(6), Attention(), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens + self.layer(tokens)


class Before(nn.Module):
    """A ViT: a class token, 2 x 3 patches, two blocks, a head that reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 5)

    def embedded(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, 6, 6)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)  # (B, 7, 6)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embedded(x)
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream)

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream[:, 0])


class Expected(Before):
    """The same, whose last block computes the class token only."""

    def forward(self, x: Tensor) -> Tensor:
        stream = self.blocks[0](self.embedded(x))
        block, attention = self.blocks[1], self.blocks[1].attention
        normed = block.norm(stream)  # (B, 7, 6)
        first = attention.query(normed.narrow(-2, 0, 1))  # (B, 1, 6)
        query = first.reshape(first.shape[0], -1, 2, 3).transpose(1, 2)
        key = attention.key(normed)
        key = key.view(key.shape[0], -1, 2, 3).transpose(1, 2)
        value = attention.value(normed)
        value = value.view(value.shape[0], -1, 2, 3).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        joined = mixed.transpose(1, 2).reshape(normed.shape[0], 1, 6)
        branch = attention.out(joined)  # (B, 1, 6)
        tokens = stream.narrow(-2, 0, 1) + branch
        return self.read(tokens + block.layer(tokens))


def narrowing(model: nn.Module, opened: tuple[str, ...] = ()) -> tuple[Narrowing, torch.fx.Graph]:
    """What is found in a model whose modules of modules are all traced through, or only `opened`."""
    graph = trace(model, IMAGES, lambda _, name: name in opened).graph if opened else graph_of(model, IMAGES)
    root = scratch_copy(enliven(model).eval())
    found = narrow_rows.find_sites(root, prune_tokens.find_site(graph, BLOCKS), BLOCKS, (), opened)
    return found, graph


def test_the_last_block_computes_the_row_that_is_read():
    before = Before()
    found, graph = narrowing(before)
    assert (found.rows, found.block, found.reason) == (1, "blocks.1", "")
    narrow_rows.rewrite(graph, found)
    assert_becomes(before, graph, Expected(), IMAGES)


def test_modules_are_traced_through_from_the_last_one_that_mixes():
    opened = ["blocks"]
    for wanted in ("blocks.1", "blocks.1.attention"):
        with pytest.raises(OpenError) as error:
            narrowing(Before(), tuple(opened))
        assert error.value.modules == {wanted}
        opened.append(wanted)
    assert narrowing(Before(), tuple(opened))[0].block == "blocks.1"


class Averaged(Before):
    """Near miss: the head averages all tokens."""

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream.mean(1))


class Returned(Before):
    """Near miss: the tokens are returned beside the logits."""

    def read(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        return super().read(stream), stream


class Beside(Before):
    """Near miss: an average of the patches joins the class token."""

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream[:, 0] + stream[:, 1:].mean(1))


class LastToken(Before):
    """Near miss: a patch is read by its place."""

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream[:, -1])


class Counted(Before):
    """Near miss: the head divides by the number of tokens."""

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream[:, 0]) / stream.shape[1]


class NoPrefix(Before):
    """Near miss: patches only."""

    def embedded(self, x: Tensor) -> Tensor:
        return super().embedded(x)[:, 1:]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Averaged, "`mean` reads all rows of `add_3`"),
        (Returned, r"all rows of `add_3` \(2, 7, 6\) are returned"),
        (Beside, "`getitem_..` reads all rows of `add_3`"),
        (LastToken, "`getitem_..` reads all rows of `add_3`"),
        (Counted, "`add_3` has a number of rows that is read"),
        (NoPrefix, "there are no tokens in front of the patches"),
    ],
)
def test_what_is_read_whole_stays(kind, reason):
    found, graph = narrowing(kind())
    text = str(graph)
    assert not found.sites
    assert re.fullmatch(reason, found.reason), found.reason
    narrow_rows.rewrite(graph, found)
    assert str(graph) == text


class MixingMLP(Before):
    """Near miss: the last block's MLP mixes tokens, so only what follows it could be left out."""

    class Mixing(nn.Module):
        """A layer after an average."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(1, keepdim=True))

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].layer = self.Mixing()


class InTraining(nn.Module):
    """Treats each token independently in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x - x.mean(1, keepdim=True) if self.training else x


@pytest.mark.parametrize("name", ["mixing", "training", "batch norm"])
def test_only_what_follows_mixing_is_narrowed(name):
    model = MixingMLP() if name == "mixing" else Before()
    if name == "training":
        model.blocks[1].layer = InTraining()
    if name == "batch norm":
        model.blocks[1].layer = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(7))
    opened = ("blocks", "blocks.1", "blocks.1.attention", "blocks.1.layer")
    graph = trace(model, IMAGES, lambda _, n: n in opened[:3]).graph
    root = scratch_copy(enliven(model).eval())
    found = narrow_rows.find_sites(root, prune_tokens.find_site(graph, BLOCKS), BLOCKS, (), opened)
    names = [site.node for site in found.sites if site.narrowed]
    assert not any("attention" in node or "layer" in node for node in names), names


class Head(nn.Module):
    """Near miss: a head that averages all tokens in training mode, inside its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean(1) if self.training else x[:, 0])


class OwnHead(Before):
    """A model with such a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream)


def test_a_head_that_reads_more_in_training():
    model = OwnHead()
    graph = trace(model, IMAGES, lambda _, n: n == "blocks").graph
    root = scratch_copy(enliven(model).eval())
    found = narrow_rows.find_sites(root, prune_tokens.find_site(graph, BLOCKS), BLOCKS, (), ("blocks",))
    assert found.reason == "`head` reads all rows of `blocks_1`"


class TwoReaders(Before):
    """The first token feeds one head, the second another."""

    def embedded(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(x.shape[0], -1, -1) * 2, super().embedded(x)], 1)

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream[:, 0]) + self.head(stream[:, 1])


def test_as_many_rows_as_all_readers_need():
    found, graph = narrowing(model := TwoReaders())
    assert found.rows == 2
    expected = torch.fx.GraphModule(model, graph)(IMAGES)
    narrow_rows.rewrite(graph, found)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(IMAGES), expected, rtol=1e-4, atol=1e-4)
