"""Tokens as (N, B, C), as PyTorch's transformer and OpenAI's CLIP have them: pruned like those of (B, N, C)."""

import copy

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import kept_tokens


class Encoder(ToyViT):
    """PyTorch's transformer encoder on tokens of a toy ViT."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__(Shape(depth=0))
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first_block = "encoder.layers.0"

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(self.tokens(x).transpose(0, 1)).transpose(0, 1))


class AttentionBlock(nn.Module):
    """A block of OpenAI's CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(ToyViT):
    """Reads its class token as the first row of (N, B, C), or flattens its grid to (N, B, C) at once."""

    def __init__(self, *, direct: bool) -> None:
        super().__init__(Shape(depth=0, prefix=0 if direct else 1))
        self.resblocks = nn.Sequential(AttentionBlock(), AttentionBlock())
        self.direct = direct
        self.first_block = "resblocks.0"

    def forward(self, x: Tensor) -> Tensor:
        if self.direct:
            return self.head(self.resblocks(self.proj(x).flatten(2).permute(2, 0, 1) + self.pos.transpose(0, 1)).mean(0))
        return self.head(self.resblocks(self.tokens(x).permute(1, 0, 2))[0])


BUILD = {
    "pre-norm": lambda: Encoder(norm_first=True),
    "post-norm": lambda: Encoder(norm_first=False),
    "class row": lambda: Tower(direct=False),
    "flattened": lambda: Tower(direct=True),
}


def on_kept(model: nn.Module, keep: Tensor, x: Tensor) -> Tensor:
    """The model whose first block gets only the tokens `keep` (B, K)."""

    def pick(_module, args):
        handle.remove()
        tokens = torch.stack([args[0][rows, sample] for sample, rows in enumerate(keep)], dim=1)
        return (tokens, *args[1:])

    handle = model.get_submodule(model.first_block).register_forward_pre_hook(pick)
    return model(x)


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_equals_the_model_on_the_kept_tokens(name):
    model = enliven(BUILD[name]()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    prefix = papr_fx.report(gm).sites[0].prefix
    assert prefix == model.shape.prefix
    x = images(Shape(), 3)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    assert relative_error(gm(x), on_kept(model, kept_tokens(mask, prefix), x)) < 1e-12
    assert relative_error(gm(x), on_kept(model, kept_tokens(mask.roll(1, 0), prefix), x)) > 1e-6
    whole = copy.deepcopy(gm)
    papr_fx.set_keep_ratio(whole, 1.0)
    assert torch.equal(whole(x), model(x))
    assert "_batch_first" in papr_fx.graph_diff(model, gm)


def test_merging_them_is_refused():
    with pytest.raises(papr_fx.PaprError):
        papr_fx.transform(BUILD["class row"]().eval(), toy_proposal(), 0.8, merge=papr_fx.Merge(2))
