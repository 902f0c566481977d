"""What a rewritten module has of its model besides tensors: flags, attributes, properties; and what its copies keep."""

import copy
import functools
import inspect
import pickle
from types import MethodType

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import papr_fx
from papr_fx.planning.module import PrunedModule
from papr_fx.proof import traced
from papr_fx.tracing.fakes import aliased_copy, flags_of

from ..models import Shape, ToyViT, images, toy_proposal


def pruned(model: nn.Module, z: float = 0.5) -> PrunedModule:
    return papr_fx.transform(model, toy_proposal(), z, verify=False)


class Extracted(nn.Module):
    """Holds a graph module with a graph for each mode, whose deepcopy comes back in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = Shape().image
        self.inner = create_feature_extractor(ToyViT(Shape()).eval(), ["head"])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)["head"]


@pytest.mark.parametrize("training", [False, True])
def test_copies_have_the_flags_of_a_model_that_copies_itself_in_another_mode(training):
    model = Extracted().train(training)
    gm = pruned(model)
    for copied in (aliased_copy(model), gm, copy.deepcopy(gm)):
        assert {flags_of(copied)[name] for name in flags_of(model)} == {training}
    assert model.inner.graph is (model.inner.train_graph if training else model.inner.eval_graph)
    copied = aliased_copy(model)
    assert copied.inner.graph is (copied.inner.train_graph if training else copied.inner.eval_graph)


def test_the_proof_compares_flags():
    model = ToyViT(Shape()).eval()
    gm = pruned(model)
    traced.check_flags(model, gm)
    gm.blocks[0].mlp[2].training = True
    with pytest.raises(papr_fx.VerifyError, match=r"tracing: `blocks.0.mlp.2` is in training mode"):
        traced.check_flags(model, gm)


def test_choose_keep_ratio_leaves_such_a_model_in_its_mode():
    model = Extracted().train()
    papr_fx.choose_keep_ratio(model, toy_proposal(), [images(Shape(), 2, dtype=torch.float32)], gmacs=1.0, verify=False)
    assert set(flags_of(model).values()) == {True}
    assert model.inner.graph is model.inner.train_graph


class Frozen(ToyViT):
    """Keeps its first block in eval mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.blocks[0].eval()
        return self


def test_train_sets_the_flags_that_the_models_own_train_sets():
    model = Frozen(Shape()).eval()
    gm = pruned(model)
    for module in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for mode in (True, False, True):
            model.train(mode)
            module.train(mode)
            assert {name: flags_of(module)[name] for name in flags_of(model)} == flags_of(model)


class Described(ToyViT):
    """States facts about itself."""

    kind = "described"

    def __init__(self) -> None:
        super().__init__(Shape())
        self.config = {"width": 8}
        self.num_classes = 7
        self.meta = {"of": "the model"}
        self.hidden = [ToyViT(Shape())]

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(x)


def keep_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 2


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda gm: pickle.loads(pickle.dumps(gm))}


def test_plain_attributes_and_properties_of_the_model_are_there():
    gm = pruned(Described().eval())
    assert (gm.config, gm.num_classes, gm.kind, gm.shape) == ({"width": 8}, 7, "described", Shape())
    assert gm.dtype == torch.float32
    assert copy.deepcopy(gm).double().dtype == torch.float64
    assert gm.meta == {}  # what a GraphModule defines is its own
    assert not hasattr(gm, "forward_features")  # it would run unpruned
    assert not hasattr(gm, "hidden")  # modules are none


def test_metadata_of_timm_and_transformers():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=10).eval()
    gm = pruned(model)
    assert timm.data.resolve_model_data_config(gm) == timm.data.resolve_model_data_config(model)
    assert (gm.feature_info, gm.num_classes) == (model.feature_info, 10)
    assert gm.no_weight_decay() == model.no_weight_decay()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=32
    )
    gm = pruned(transformers.ViTModel(config).eval())
    assert (gm.config.hidden_size, gm.dtype, gm.device.type) == (16, torch.float32, "cpu")


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_keep_attributes_meta_and_hooks(copied):
    gm = pruned(Described().eval())
    gm.out_channels, gm.meta["note"] = 192, "kept"
    gm.register_forward_hook(keep_output)
    other = copied(gm)
    x = images(Shape(), 2, dtype=torch.float32)
    assert (other.out_channels, other.meta, other.num_classes, other.dtype) == (192, {"note": "kept"}, 7, torch.float32)
    assert torch.equal(other(x), gm(x))
    papr_fx.set_keep_ratio(other, 0.25)
    assert papr_fx.report(gm).z == 0.5
    assert not torch.equal(other(x), gm(x))


def wrapped(forward):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **kwargs)

    return run


def bind(gm: nn.Module) -> None:
    gm.forward = wrapped(gm.forward)


def bind_function(gm: nn.Module) -> None:
    """As accelerate's mixed precision does."""
    gm.forward = MethodType(wrapped(gm.forward.__func__), gm)


@pytest.mark.parametrize("binding", [bind, bind_function])
def test_a_forward_bound_to_the_instance_follows_the_keep_ratio_and_the_mode(binding):
    model = ToyViT(Shape()).eval()
    plain, gm = pruned(model), pruned(model)
    binding(gm)
    x = images(Shape(), 2, dtype=torch.float32)
    assert list(inspect.signature(gm.forward).parameters) == ["x"]
    for z in (0.5, 0.25, 1.0, 0.5):
        for module in (plain, gm):
            papr_fx.set_keep_ratio(module, z)
        assert torch.equal(gm(x), plain(x))


class ModeViT(ToyViT):
    """A forward that computes something else in training."""

    def classify(self, x: Tensor) -> Tensor:
        return (super().classify(x) * 3) if self.training else super().classify(x)


def test_a_forward_bound_to_the_instance_follows_the_mode():
    model = ModeViT(Shape()).eval()
    for block in model.blocks:
        block.mlp[2].p = 0.0
    gm = pruned(model)
    bind(gm)
    x = images(Shape(), 2, dtype=torch.float32)
    evaluated = gm(x)
    assert torch.allclose(gm.train()(x), 3 * evaluated, rtol=1e-5, atol=1e-5)
    assert torch.equal(gm.eval()(x), evaluated)


def test_a_copy_of_a_module_with_a_bound_forward_follows_its_own_keep_ratio():
    gm = pruned(ToyViT(Shape()).eval())
    bind_function(gm)
    x = images(Shape(), 2, dtype=torch.float32)
    before, other = gm(x), copy.deepcopy(gm)
    papr_fx.set_keep_ratio(other, 0.25)
    assert torch.equal(gm(x), before)
    assert not torch.equal(other(x), before)
