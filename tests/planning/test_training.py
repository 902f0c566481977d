"""Training a transformed model: gradients, modes, weight averages, compiled steps and checkpoints."""

import copy

import pytest
import timm
import torch
import transformers
from timm.utils import ModelEmaV3
from torch import nn

import papr_fx
from papr_fx.tracing.blocks import last_tokens
from papr_fx.tracing.graphs import cut
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import attention_without
from ..reducers import Eager, merging


def videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=5,
    )
    return enliven(transformers.VideoMAEForVideoClassification._from_config(config)).double()


TOKENS = {
    "ViT": (lambda: ToyViT(Shape(pool="cls")).double(), (3, 3, *Shape().image), "blocks"),
    "DeiT": (
        lambda: enliven(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)).double(),
        (2, 3, 64, 64),
        "blocks",
    ),
    "VideoMAE": (videomae, (2, 4, 3, 32, 32), "videomae.encoder.layer"),
}


def quiet(model: nn.Module) -> nn.Module:
    """The model in training mode without dropout, so that its outputs are repeatable."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def kept_tokens(gm, x):
    nodes = {node.name: node for node in gm.graph.nodes}
    return cut(gm, gm.graph, nodes["papr_keep"])(x)


@pytest.mark.parametrize("name", TOKENS)
def test_gradients_are_those_of_hidden_keys(name):
    """Gradients through the kept tokens after the last block equal those of the unpruned model with all others hidden."""
    make, shape, blocks = TOKENS[name]
    model = quiet(make())
    x = torch.randn(shape, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], narrow=False)
    assert gm.training
    keep = kept_tokens(gm, x)
    seen = {}
    last = model.get_submodule(blocks)[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: seen.update(tokens=output))
    total = {"ViT": 17, "DeiT": 17, "VideoMAE": 32}[name]
    hidden = torch.ones(len(x), total, dtype=torch.bool).scatter(1, keep, False)
    with attention_without(hidden) as mode:
        model(x)
    handle.remove()
    assert mode.seen == 2
    tokens = seen["tokens"][0] if isinstance(seen["tokens"], tuple) else seen["tokens"]
    expected = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    weights = torch.randn(expected.shape, dtype=torch.float64)
    graph = gm.graph
    site = last_tokens(graph, next(n for n in graph.nodes if n.name == "papr_tokens"), gm.plan.eval.blocks)
    actual = cut(gm, graph, site)(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    found = torch.autograd.grad((actual * weights).sum(), parameters, allow_unused=True)
    pairs = [(a, e) for a, e in zip(found, wanted, strict=True) if a is not None or e is not None]
    assert len(pairs) > 20
    assert max(relative_error(a, e) for a, e in pairs) < 1e-8
    assert not any(t.requires_grad for t in gm.papr_proposal.buffers())


def test_gradients_flow_through_merged_tokens():
    model = quiet(ToyViT(Shape(depth=4)).double())
    x = images(model.shape, 2)
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    keeps = kept_tokens(gm, x).tolist()
    merged = Eager(merging(2, 1), (2, 3))
    expected = sum(merged.run(model, i, keep).square().sum() for i, keep in zip(x, keeps, strict=True))
    parameters = [p for name, p in model.named_parameters() if name != "query"]
    wanted = torch.autograd.grad(expected, parameters)
    found = torch.autograd.grad(gm(x).square().sum(), parameters)
    assert max(relative_error(a, e) for a, e in zip(found, wanted, strict=True)) < 1e-8


def hierarchical(name: str, **options) -> nn.Module:
    """As small as it goes: each further block is compiled anew, forward and backward."""
    torch.manual_seed(0)
    return enliven(timm.create_model(name, num_classes=5, **options))


def convnext() -> nn.Module:
    return hierarchical("convnext_tiny", depths=(1, 1, 0, 0), dims=(8, 16, 16, 16))


def swin() -> nn.Module:
    options = {"img_size": 64, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "drop_path_rate": 0.0}
    return hierarchical("swin_tiny_patch4_window7_224", **options)


MAKERS = {
    "ViT": lambda: (ToyViT(Shape(depth=1)), images(Shape(), 4, dtype=torch.float32), {}),
    "merged ViT": lambda: (ToyViT(Shape(depth=4)), images(Shape(), 4, dtype=torch.float32), {"merge": papr_fx.Merge(2)}),
    "ConvNeXt": lambda: (convnext(), torch.randn(4, 3, 64, 64), {}),
    "Swin": lambda: (swin(), torch.randn(4, 3, 64, 64), {}),
    "VideoMAE": lambda: (videomae().float(), torch.randn(4, 4, 3, 32, 32), {}),
}


def transformed(name, *, verify=False):
    model, x, options = MAKERS[name]()
    gm = papr_fx.transform(quiet(model), toy_proposal(), 0.5, example_input=x[:1], verify=verify, **options)
    return model, gm, x


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_changes_the_model_and_an_average_follows(name):
    model, gm, x = transformed(name, verify=True)
    average = ModelEmaV3(gm, decay=0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=1e-3)
    logits(gm(x)).square().mean().backward()
    optimiser.step()
    average.update(gm, step=1)
    after = model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    decay = average.get_decay(1)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point() and "running" not in key:
            assert relative_error(value, before[key] * decay + after[key] * (1 - decay)) < 1e-5
    assert logits(average.module.eval()(x)).shape[0] == 4


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", MAKERS)
def test_checkpoints_are_those_of_the_dense_model(name):
    model, gm, x = transformed(name)
    assert gm.state_dict().keys() == model.state_dict().keys()
    fresh = copy.deepcopy(model)
    enliven(fresh, seed=5)
    fresh.load_state_dict(gm.state_dict())
    other = papr_fx.transform(fresh, toy_proposal(), 0.5, example_input=x[:1], merge=gm.plan.reduction, verify=False)
    assert torch.equal(logits(other.eval()(x)), logits(gm.eval()(x)))
    enliven(fresh, seed=6)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(logits(other(x)), logits(gm(x)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_compiled_steps_have_the_eager_gradients(name):
    model, gm, x = transformed(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(logits(gm(x)).square().sum(), parameters, allow_unused=True)
    torch.compiler.reset()
    fast = torch.compile(gm, fullgraph=True)
    found = torch.autograd.grad(logits(fast(x)).square().sum(), parameters, allow_unused=True)
    pairs = [(a, e) for a, e in zip(found, wanted, strict=True) if e is not None]
    assert len(pairs) > 10
    assert max(relative_error(a, e) for a, e in pairs) < 1e-3


def test_modes_follow_the_module():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, drop_rate=0.5, proj_drop_rate=0.5)
    gm = papr_fx.transform(model.train(), toy_proposal(), 0.5)
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(gm(x), gm(x))
    assert torch.equal(gm.eval()(x), gm(x))
    assert model.training
    assert not torch.equal(gm.train()(x), gm(x))
    assert not gm.papr_proposal.training
