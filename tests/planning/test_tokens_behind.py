"""Tokens behind the patches: they stay, as those in front do, and nothing else changes its place."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx import ops, peers
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import attention_without, count_by_hand
from ..proof.parts import case_of, failures

SHAPE = Shape(depth=1)
MORE = 3


def plain_attention() -> nn.Module:
    return Attention(8, 2, True)


class Behind(ToyViT):
    """[class, patches, more tokens]; `pool` patches or last."""

    def __init__(self, attention=plain_attention, pool: str = "patches", prefix: int = 1) -> None:
        super().__init__(Shape(depth=1, prefix=prefix))
        self.pool = pool
        self.last = nn.Parameter(torch.zeros(1, MORE, 8))
        self.blocks = nn.ModuleList([Block(8, attention())])
        self.pos = nn.Parameter(torch.zeros(1, prefix + 16 + MORE, 8))
        enliven(self)

    def tokens(self, x: Tensor) -> Tensor:
        first, last = (part.expand(x.shape[0], -1, -1) for part in (self.first, self.last))
        return torch.cat([first, self.patches(x), last], dim=1) + self.pos

    def classify(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(x[:, self.shape.prefix : -MORE].mean(1) if self.pool == "patches" else x[:, -1])


class Biased(Attention):
    """A bias for each pair of all tokens, and a rotary factor for patches alone."""

    def __init__(self) -> None:
        super().__init__(8, 2, True)
        self.bias = nn.Parameter(torch.randn(1, 2, 17 + MORE, 17 + MORE))
        self.factor = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q = torch.cat([q[:, :, :1], q[:, :, 1:-MORE] * self.factor, q[:, :, -MORE:]], dim=2)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).reshape(b, n, c))


class OneSided(Attention):
    """A factor for each token but the class token."""

    def __init__(self, prefix: int) -> None:
        super().__init__(8, 2, True)
        self.prefix = prefix
        self.factor = nn.Parameter(torch.randn(16 + MORE, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, : self.prefix], x[:, self.prefix :] * self.factor], dim=1))


def kept_rows(gm, x: Tensor, prefix: int = 1, suffix: int = MORE) -> Tensor:
    """Rows that should be left, (B, K), from the mask."""
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    ends = torch.ones(len(x), prefix, dtype=torch.bool), torch.ones(len(x), suffix, dtype=torch.bool)
    rows = torch.cat([ends[0], mask.flatten(1), ends[1]], dim=1)
    return torch.stack([sample.nonzero()[:, 0] for sample in rows])


@pytest.mark.parametrize("pool", ["patches", "last"])
@torch.no_grad()
def test_other_tokens_stay_in_their_places(pool):
    model = Behind(pool=pool).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.4)
    x = images(SHAPE, 3)
    rows = kept_rows(gm, x)
    assert rows.shape[1] == 1 + count_by_hand(16, 0.4, 1 + MORE) + MORE
    tokens = model.tokens(x)
    kept = torch.stack([sample[index] for sample, index in zip(tokens, rows, strict=True)])
    assert relative_error(gm(x), model.classify(model.blocks[0](kept))) < 1e-12
    assert relative_error(gm(x), model(x)) > 1e-3
    (site,) = papr_fx.report(gm).sites
    assert (site.prefix, site.suffix, site.dense, site.kept) == (1, MORE, 20, rows.shape[1])
    assert "suffix" in str(papr_fx.report(gm))
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model(x))


@torch.no_grad()
def test_tables_of_all_tokens_and_of_patches():
    model = Behind(Biased).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)  # proved: the permutation moves every table
    x = images(SHAPE, 2)
    hidden = torch.ones(2, 20, dtype=torch.bool).scatter(1, kept_rows(gm, x), False)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with attention_without(hidden):
        model(x)
    expected = torch.stack([sample[~gone] for sample, gone in zip(seen[0], hidden, strict=True)])
    assert relative_error(gm(x), model.classify(expected)) < 1e-12


@torch.no_grad()
def test_tables_without_one_end():
    papr_fx.transform(Behind(partial(OneSided, 1)).double().eval(), toy_proposal(), 0.5)
    with pytest.raises(papr_fx.NoSiteError, match="3 stand in front of the patches and behind them alike"):
        papr_fx.transform(Behind(partial(OneSided, 3), prefix=3).eval(), toy_proposal(), 0.5, mode="tokens", verify=False)


class LastClass(Behind):
    """The class token comes last: [patches, class]. It hands its tokens out too."""

    def __init__(self) -> None:
        super().__init__(prefix=0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks[0](self.tokens(x))
        return self.classify(x), x


@torch.no_grad()
def test_tokens_that_are_handed_out_go_back_to_their_places():
    gm = papr_fx.transform(LastClass().double().eval(), toy_proposal(), 0.5)
    x = images(SHAPE, 2)
    tokens = gm(x)[1]
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    grid = papr_fx.restore_grid(gm, tokens, x)
    assert torch.equal(grid.permute(0, 2, 3, 1)[mask], tokens[:, :-MORE].flatten(0, 1))
    assert torch.equal(papr_fx.restore_grid(gm, tokens[:, :-MORE], x), grid)
    with pytest.raises(papr_fx.ArgumentError, match=r"must be \(B, 0 \+ 9 \+ 3, C\)"):
        papr_fx.restore_grid(gm, tokens[:, 1:], x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_ends_are_found_on_the_model(dtype):
    class Bytes(Behind):
        def patches(self, x: Tensor) -> Tensor:
            return super().patches(x.float())

    gm = papr_fx.transform(
        Bytes().eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, dtype=dtype), verify=False
    )
    assert papr_fx.report(gm).sites[0].suffix == MORE


def test_the_ends_of_a_model_without_weights():
    with torch.device("meta"):
        model = Behind()
    gm = papr_fx.transform(model.eval(), toy_proposal(), 0.5, verify=False)
    assert papr_fx.report(gm).sites[0].suffix == MORE


def test_other_tokens_between_the_patches_are_refused():
    class Between(ToyViT):
        def tokens(self, x: Tensor) -> Tensor:
            patches = self.patches(x)
            return torch.cat([patches[:, :5], self.first.expand(x.shape[0], -1, -1), patches[:, 5:]], dim=1) + self.pos

    with pytest.raises(papr_fx.NoSiteError, match=r"between the patches of `add`: sought 16 .* found 5 \+ 11\. Put"):
        papr_fx.transform(Between(SHAPE).eval(), toy_proposal(), 0.5, mode="tokens", verify=False)


class Averaged(Behind):
    """With all tokens in its mean: no slice tells where the patches end."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(1))


def test_geometry_finds_a_wrong_end(monkeypatch):
    monkeypatch.setattr("papr_fx.planning.token_planner.tokens_behind", lambda *_: MORE + 1)
    assert "the last 4 of `add` were taken" in failures(case_of(Averaged()))["geometry"]


MERGES = {
    "merge": papr_fx.Merge(3, "all"),
    "fuse": peers.TokenFusion(3, "all"),
    "propagate": peers.TokenPropagation(3, "all"),
    "attend": peers.AttentionPruning(3, "all"),
}


@pytest.mark.parametrize("name", MERGES)
@torch.no_grad()
def test_merging_leaves_them(name):
    model = Behind()
    model.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))
    enliven(model).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.6, merge=MERGES[name])
    assert papr_fx.report(gm).reduced == (("blocks.0", 16, 13), ("blocks.1", 13, 10))
    assert gm(images(SHAPE, 2)).isfinite().all()


def test_matching_and_dropping_leave_the_last_tokens():
    keys = torch.randn(2, 2, 20, 4)
    keys[:, :, -MORE:] = keys[:, :, 1:2]  # most alike, so they would be merged first
    for found in (
        ops.match_tokens(keys, 5, 1, MORE).stay,
        ops.split_by_score(torch.randn(2, 16), 5, 1, MORE)[0],
        ops.most_attended(keys, keys, keys, 5, 1, None, MORE),
        ops.choose_tokens(keys, keys, None, 5, 1, None, MORE)[0],
    ):
        assert found.shape == (2, 15)
        assert found[:, 0].eq(0).all()
        assert found[:, -MORE:].equal(torch.arange(17, 20).expand(2, -1))
        assert found[:, 1:-MORE].lt(17).all()
    matching = ops.match_tokens(keys, 5, 1, MORE)
    assert matching.merged.lt(17).all()
    assert matching.into.lt(12).all()
    graph = ops.neighbour_graph(keys, None, (4, 4), 1, 2, MORE)
    assert not graph[:, -MORE:].any()
    assert not graph[:, :, -MORE:].any()
    assert graph[:, 1:-MORE, 1:-MORE].any()
    sizes = torch.arange(20.0).expand(2, -1)
    assert ops.last_sizes(sizes, 16, MORE).equal(sizes[:, 1:17])
    assert ops.last_sizes(sizes, 20, MORE).equal(sizes)


class PooledBehind(Behind):
    """Averages the patches and the tokens behind them, without the class token."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 1:].mean(1))


def test_merging_refuses_a_mean_over_one_end():
    with pytest.raises(papr_fx.NoSiteError, match="merge: `mean` reads the patches and the other tokens of one end alone"):
        papr_fx.transform(PooledBehind().eval(), toy_proposal(), 0.6, mode="tokens", merge=papr_fx.Merge(2, "all"))
