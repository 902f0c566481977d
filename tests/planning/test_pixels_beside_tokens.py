"""`mode="pixels"` on models of tokens: MLPs run on kept patches and on all other tokens, in front and behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, toy_proposal
from ..oracles import count_by_hand

SHAPE = Shape(image=(8, 12), patch=(2, 2), prefix=0, depth=2)  # 4 x 6 patches


class Ends(ToyViT):
    """[some tokens, patches, more tokens], at any image size."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(SHAPE)
        self.ends = nn.ParameterList([torch.zeros(1, first, 8), torch.zeros(1, last, 8)])
        self.table = nn.Parameter(torch.zeros(1, 8, *SHAPE.grid))
        enliven(self).double().eval()

    def patches(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return (x + F.interpolate(self.table, x.shape[-2:])).flatten(2).transpose(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        first, last = (end.expand(x.shape[0], -1, -1) for end in self.ends)
        return torch.cat([first, self.patches(x), last], dim=1)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, -1])


def masked(model: Ends, x: Tensor, mask: Tensor) -> Tensor:
    """The model, without what MLPs give for dropped patches."""
    first, last = (torch.ones(len(x), end.shape[1], dtype=torch.bool) for end in model.ends)
    rows = torch.cat([first, mask.flatten(1), last], dim=1).unsqueeze(-1)
    hooks = [block.mlp.register_forward_hook(lambda _m, _i, output: output * rows) for block in model.blocks]
    output = model(x)
    for hook in hooks:
        hook.remove()
    return output


@pytest.mark.parametrize(("first", "last"), [(1, 3), (0, 3), (2, 0)])
@torch.no_grad()
def test_other_tokens_keep_their_mlps(first, last):
    model = Ends(first, last)
    gm = papr_fx.transform(model, toy_proposal(), 0.4, mode="pixels")
    for size in ((8, 12), (8, 20)):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (mask,) = papr_fx.keep_masks(gm, x).values()
        cells = size[0] * size[1] // 4
        assert mask.flatten(1).sum(1).tolist() == [count_by_hand(cells, 0.4, 0)] * 2
        assert relative_error(gm(x), masked(model, x, mask)) < 1e-12
        assert relative_error(gm(x), masked(model, x, ~mask)) > 1e-3
    sites = papr_fx.report(gm).sites
    assert [(s.prefix, s.suffix, s.dense, s.kept) for s in sites] == [(first, last, 24 + first + last, 9 + first + last)] * 2


def test_the_ends_are_found_without_a_proof():
    gm = papr_fx.transform(Ends(1, 3).float(), toy_proposal(), 0.4, mode="pixels", verify=False)
    assert {(site.prefix, site.suffix) for site in papr_fx.report(gm).sites} == {(1, 3)}


def test_other_tokens_between_the_patches_are_refused():
    class Between(Ends):
        def tokens(self, x: Tensor) -> Tensor:
            patches = self.patches(x)
            return torch.cat([patches[:, :5], self.ends[0].expand(x.shape[0], -1, -1), patches[:, 5:]], dim=1)

    with pytest.raises(papr_fx.NoSiteError, match=r"between the patches of .* found 5 \+ 19\. Put"):
        papr_fx.transform(Between(1, 0), toy_proposal(), 0.4, mode="pixels", verify=False)
