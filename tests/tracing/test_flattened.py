"""Models that were traced through all modules before, as one long graph."""

import pytest
import timm
import torch
from torch import fx, nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor

import papr_fx
from papr_fx.tracing.flattened import name_holders
from papr_fx.tracing.trace import trace

IMAGES = torch.zeros(1, 3, 64, 64)


def scaled(model: nn.Module) -> nn.Module:
    """The model with parameters of about unit size, so that a wrong position shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "pos" in name or "table" in name or "token" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def timm_model(name: str, **options) -> nn.Module:
    sizes = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    return scaled(timm.create_model(name, img_size=64, num_classes=10, **{**sizes, **options}))


MODELS = {
    "ViT": lambda: timm_model("vit_tiny_patch16_224"),
    "one block": lambda: timm_model("vit_tiny_patch16_224", depth=1),
    "no class token, mean behind the last block": lambda: timm_model(
        "vit_tiny_patch16_224", class_token=False, global_pool="avg", final_norm=False
    ),
    "tables in blocks": lambda: timm_model("beit_base_patch16_224"),
    "two lists of blocks": lambda: timm_model("cait_xxs24_224"),
    "torchvision": lambda: scaled(VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=10)),
}


def pruned(model: nn.Module, *, verify: bool = False) -> papr_fx.PrunedModule:
    options = {"example_input": IMAGES, "input_stats": "shared", "verify": verify}
    return papr_fx.transform(model, nn.AvgPool2d(16), 0.5, **options)


SLOW = ("one block", "no class token, mean behind the last block", "torchvision")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS])
def test_pruned_as_before_it_was_traced(name):
    model = MODELS[name]()
    expected, found = pruned(model), pruned(fx.symbolic_trace(model))
    a, b = papr_fx.report(expected), papr_fx.report(found)
    assert b.mode == "tokens"
    assert b.sites[0].name.rpartition("-> ")[2] == a.sites[0].name.rpartition("-> ")[2]
    assert b.total_macs == a.total_macs  # the same rows are narrowed
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(found(images), expected(images))


def test_feature_extractors_and_parts_of_a_model():
    model = MODELS["torchvision"]()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = pruned(model)(images)
        extractor = pruned(create_feature_extractor(model, {"heads": "logits"}), verify=True)
        torch.testing.assert_close(extractor(images)["logits"], expected)
        torch.testing.assert_close(extractor.train()(images)["logits"], expected)
        torch.testing.assert_close(pruned(nn.Sequential(nn.Identity(), fx.symbolic_trace(model)))(images), expected)


def test_grids_stay_pixels():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(2, 2), embed_dim=24, num_heads=(2, 2)
    ).eval()
    assert papr_fx.report(pruned(fx.symbolic_trace(swin))).mode == "pixels"


class Shared(nn.Module):
    """A block whose table belongs to the model, and a mean behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)])
        self.table = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for norm, linear in self.blocks:
            x = x + linear(norm(x) * self.table)
        torch._assert(x.shape[1] == 3, "three tokens")
        return self.head(x.mean(1))


def test_nodes_without_a_name():
    flat = fx.symbolic_trace(Shared())
    graph = trace(flat, torch.zeros(1, 3, 4), lambda *_: False).graph
    inside = {node.name: next(reversed(node.meta["inside"]), "") for node in graph.nodes}
    assert inside["mul"] == "blocks.0"  # behind a table that lies elsewhere
    assert inside["add"] == "blocks.0"
    assert inside["add_1"] == "blocks.1"
    assert inside["mean"] == ""  # another shape, and the next name lies outside
    assert inside["blocks_1_1"] == "blocks.1.1"


def test_other_models_are_left_alone():
    model = Shared()
    graph = trace(model, torch.zeros(1, 3, 4), lambda *_: False).graph
    before = [node.meta["inside"] for node in graph.nodes]
    name_holders(graph, model)
    assert [node.meta["inside"] for node in graph.nodes] == before
    assert not any(node.name == "mul" and node.meta["inside"] for node in graph.nodes)
