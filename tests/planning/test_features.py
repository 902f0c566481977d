"""`output="features"` and `restore_grid`: features of the kept tokens, put back into their grid."""

import pytest
import timm
import torch

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, toy_proposal
from ..oracles import attention_without


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "prefix"), [("vit_tiny_patch16_224", 1), ("eva02_tiny_patch14_224", 1), ("vit_small_patch16_dinov3", 5)]
)
@pytest.mark.parametrize("how", ["output", "headless"])
@torch.no_grad()
def test_features_of_the_kept_tokens(name, prefix, how):
    """Features of kept tokens equal those of the unpruned model with all other tokens hidden, each in its place."""
    options = {"img_size": 56} if "14" in name else {"img_size": 64, "embed_dim": 64, "num_heads": 2}
    headless = {"num_classes": 0, "global_pool": ""} if how == "headless" else {}
    model = timm.create_model(name, **{**options, "depth": 2, **headless}).double().eval()
    gm = papr_fx.transform(model, toy_proposal().double(), 0.5, output="features" if how == "output" else "logits")
    x = torch.randn(3, *model.pretrained_cfg["input_size"][:1], *gm.plan.example.shape[2:], dtype=torch.float64)
    ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
    tokens = gm(x)
    assert tokens.shape[:2] == (3, prefix + int(mask[0].sum()))
    hidden = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    with attention_without(hidden):
        dense = model.forward_features(x)
    expected = dense[:, prefix:].transpose(1, 2).reshape(3, -1, *grid) * mask.unsqueeze(1)
    restored = papr_fx.restore_grid(gm, tokens, x)
    assert relative_error(restored, expected) < 1e-9
    assert torch.equal(papr_fx.restore_grid(gm, tokens[:, prefix:], x), restored)
    filled = papr_fx.restore_grid(gm, tokens, x, fill=torch.full((tokens.shape[2],), 7.0))
    assert torch.equal(filled, torch.where(mask.unsqueeze(1), restored, 7.0))
    assert papr_fx.graph_diff(model, gm)
    with pytest.raises(papr_fx.ArgumentError, match="tokens must be"):
        papr_fx.restore_grid(gm, tokens[:, 2:], x)
    with pytest.raises(papr_fx.ArgumentError, match="fill must be"):
        papr_fx.restore_grid(gm, tokens, x, fill=None)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model.forward_features(x))
    whole = papr_fx.restore_grid(gm, gm(x), x)
    assert torch.equal(whole, model.forward_features(x)[:, prefix:].transpose(1, 2).reshape(3, -1, *grid))


def test_features_need_a_model_that_has_them():
    with pytest.raises(papr_fx.ArgumentError, match="has none"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, output="features")
    with pytest.raises(papr_fx.ArgumentError, match="output must be one of"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, output="tokens")
    gm = papr_fx.transform(timm.create_model("convnext_atto").eval(), toy_proposal(), 0.5, output="features", verify=False)
    assert gm(torch.randn(1, 3, 64, 64)).shape == (1, 320, 2, 2)
    with pytest.raises(papr_fx.ArgumentError, match="for token models"):
        papr_fx.restore_grid(gm, torch.zeros(1, 4, 320), torch.randn(1, 3, 64, 64))
