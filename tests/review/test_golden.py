"""Graph diffs of real models, stored for review in golden/; `pytest --accept` rewrites them."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision.models.video
import transformers

import papr_fx
from papr_fx.testing import assert_golden

from ..models import Shape, ToyViT, toy_proposal
from ..versions import AS_WRITTEN

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    "vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224"),
    "vit_base_patch16_mae": lambda: timm.create_model("vit_base_patch16_224", global_pool="avg"),
    "vit_base_patch16_siglip_224": lambda: timm.create_model("vit_base_patch16_siglip_224"),
    "vit_small_patch14_reg4_dinov2": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224),
    "deit_tiny_distilled_patch16_224": lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
    "vit_tiny_dynamic": lambda: timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True),
    "torchvision_vit_b_32": lambda: torchvision.models.vit_b_32(),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "convnextv2_atto": lambda: timm.create_model("convnextv2_atto"),
    "swin_tiny_patch4_window7_224": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "caformer_s18": lambda: timm.create_model("caformer_s18"),
    "torchvision_convnext_tiny": lambda: torchvision.models.convnext_tiny(),
    "torchvision_swin_v2_t": lambda: torchvision.models.swin_v2_t(),
    "torchvision_maxvit_t": lambda: torchvision.models.maxvit_t(),
    "eva02_tiny_patch14_224": lambda: timm.create_model("eva02_tiny_patch14_224"),
    "vit_small_patch16_dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", img_size=224),
    "beit_base_patch16_224": lambda: timm.create_model("beit_base_patch16_224"),
    "vit_srelpos_small_patch16_224": lambda: timm.create_model("vit_srelpos_small_patch16_224"),
    "transformers_vit": lambda: transformers.ViTForImageClassification._from_config(transformers.ViTConfig()),
    "transformers_videomae": lambda: transformers.VideoMAEForVideoClassification._from_config(transformers.VideoMAEConfig()),
    "torchvision_swin3d_t": lambda: torchvision.models.video.swin3d_t(),
}
CLIPS = {"transformers_videomae": (1, 16, 3, 224, 224), "torchvision_swin3d_t": (1, 3, 16, 224, 224)}


MERGED = {
    "vit_small_patch16_224_merged": lambda: timm.create_model("vit_small_patch16_224"),
    "torchvision_vit_b_32_merged": lambda: torchvision.models.vit_b_32(),
}

# Their last block computes the rows that are read only. All others compute all rows.
NARROWED = {
    "vit_small_patch16_224_narrowed": lambda: timm.create_model("vit_small_patch16_224"),
    "deit_tiny_distilled_patch16_224_narrowed": lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
    "torchvision_vit_b_32_narrowed": lambda: torchvision.models.vit_b_32(),
}
COARSE = {
    "vit_small_patch16_224_coarse": lambda: timm.create_model("vit_small_patch16_224"),
    "vit_small_patch16_dinov3_coarse": lambda: timm.create_model("vit_small_patch16_dinov3", img_size=224),
    "beit_base_patch16_224_coarse": lambda: timm.create_model("beit_base_patch16_224"),
}
# Their tokens are put back in their places.
DENSE = {
    "vit_tiny_features": lambda: timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(5, 11)),
    "transformers_depth_anything": lambda: transformers.DepthAnythingForDepthEstimation._from_config(
        transformers.DepthAnythingConfig(
            backbone_config=transformers.Dinov2Config(
                num_hidden_layers=4, image_size=224, out_features=["stage1", "stage4"], reshape_hidden_states=False
            ),
            reassemble_hidden_size=768,
            neck_hidden_sizes=[48, 96],
            reassemble_factors=[2, 1],
        )
    ),
}
ALL = MODELS | MERGED | NARROWED | COARSE | DENSE


# Their code was rewritten in timm and transformers since.
REWRITTEN = (
    *("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_coarse", "vit_small_patch16_224_merged"),
    *("transformers_vit", "transformers_videomae", "transformers_depth_anything"),
)
# Large ones, and those whose form another one shows.
SLOW = (
    *("torchvision_swin3d_t", "torchvision_maxvit_t", "torchvision_swin_v2_t", "caformer_s18", "torchvision_convnext_tiny"),
    *("transformers_videomae", "transformers_vit", "vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"),
    *("beit_base_patch16_224", "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224", "torchvision_vit_b_32_merged"),
    *("vit_small_patch16_dinov3_coarse", "torchvision_vit_b_32_narrowed"),
)


def marks(name):
    return [pytest.mark.slow] * (name in SLOW) + [AS_WRITTEN] * (name in REWRITTEN)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in ALL])
def test_graph_diff(name):
    example = torch.zeros(CLIPS.get(name, (1, 3, 224, 224)))
    merge = papr_fx.Merge(2) if "merged" in name else None
    model = ALL[name]().eval()
    options = {"example_input": example, "merge": merge, "narrow": name in NARROWED}
    options["background"] = "coarse" if name in COARSE else "auto"
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False, **options)
    assert_golden(gm, GOLDEN / f"{name}.diff")


def test_no_golden_is_orphaned():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.diff" for name in ALL}


def test_diff_is_stable_and_retraces_the_model():
    model = ToyViT(Shape()).eval()
    texts = {papr_fx.graph_diff(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False)) for _ in range(3)}
    assert len(texts) == 1
    assert "0x" not in texts.pop()
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    assert papr_fx.graph_diff(model, gm) == ""

    class Other(ToyViT):
        pass

    with pytest.raises(papr_fx.ArgumentError, match="made of a ToyViT, not of a Other"):
        papr_fx.graph_diff(Other(Shape()), gm)


def test_a_changed_or_missing_golden_fails(tmp_path, monkeypatch):
    gm = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, verify=False)
    monkeypatch.delenv("PAPR_FX_ACCEPT", raising=False)
    with pytest.raises(AssertionError, match="is missing"):
        assert_golden(gm, tmp_path / "a.diff")
    monkeypatch.setenv("PAPR_FX_ACCEPT", "1")
    assert_golden(gm, tmp_path / "a.diff")
    monkeypatch.delenv("PAPR_FX_ACCEPT")
    assert_golden(gm, tmp_path / "a.diff")
    papr_fx.set_keep_ratio(gm, 0.25)
    with pytest.raises(AssertionError, match="no longer that of"):
        assert_golden(gm, tmp_path / "a.diff")
