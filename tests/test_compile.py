"""torch.compile: one graph, no more compilations than the dense model, and the same kept positions as in eager mode."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import papr_fx
from papr_fx.tracing.graphs import cut
from papr_fx.tracing.numerics import relative_error

from .models import Shape, ToyViT, enliven, images, toy_proposal
from .models.hierarchical import FAMILIES
from .models.positioned import positioned

MODELS = {
    "ViT": lambda: (ToyViT(Shape(depth=1)), (3, *Shape().image)),
    "rotary ViT": lambda: (positioned(Shape(), "rotary"), (3, *Shape().image)),
    "biased ViT": lambda: (positioned(Shape(), "bias"), (3, *Shape().image)),
    "ViT of any size": lambda: (
        timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, dynamic_img_size=True),
        (3, 64, 64),
    ),
    "ConvNeXt": lambda: (FAMILIES["ConvNeXt"].model().float(), (3, 64, 64)),
    "Swin": lambda: (FAMILIES["Swin"].model().float(), (3, 64, 64)),
    "torchvision Swin": lambda: (FAMILIES["torchvision Swin"].model().float(), (3, 64, 64)),
}


class Both(nn.Module):
    """The model, unpruned, beside the proposal: the parts of a pruned model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.proposal = model, toy_proposal()

    def forward(self, x):
        return self.model(x), self.proposal(x)


def pair(name: str) -> tuple[nn.Module, torch.fx.GraphModule, tuple[int, ...]]:
    model, shape = MODELS[name]()
    model = enliven(model).eval()
    return model, papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, *shape), verify=False), shape


class Counting:
    """A backend that counts how often it compiles."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.count = 0

    def __call__(self, gm, inputs):
        self.count += 1
        return aot_eager(gm, inputs)


def compilations(module: nn.Module, batches: list[torch.Tensor]) -> int:
    """The number of compilations while a module is called with each batch."""
    backend = Counting()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for batch in batches:
        compiled(batch)
    return backend.count


COUNTED = [*((name, False) for name in MODELS), *((name, True) for name in ("ViT", "ConvNeXt"))]
QUICK = (("ViT", True),)


@pytest.mark.parametrize(
    ("name", "training"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in COUNTED]
)
def test_no_more_compilations_than_model_and_proposal(name, training):
    """One for a batch of 1, one for larger ones, and on a CPU one more from 16 on, for a convolution with stride 1."""
    model, gm, shape = pair(name)
    batches = [torch.randn(size, *shape) for size in (1, 2, 3, 16, 64)]
    count = compilations(gm.train(training), batches)
    assert count <= compilations(Both(model).train(training), batches) <= 3


DYNAMIC = ("ViT", "ViT of any size")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in DYNAMIC else pytest.mark.slow) for name in MODELS])
def test_one_compilation_for_a_dynamic_batch(name):
    _, gm, shape = pair(name)
    batches = [torch.randn(size, *shape) for size in (2, 7, 15)]
    for batch in batches:
        torch._dynamo.mark_dynamic(batch, 0)
    assert compilations(gm, batches) == 1


@torch.no_grad()
def test_another_keep_ratio_is_compiled_once_more():
    _, gm, shape = pair("ViT")
    batch = torch.randn(2, *shape)
    backend = Counting()
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    first = compiled(batch)
    papr_fx.set_keep_ratio(gm, 0.25)
    second = compiled(batch)
    compiled(batch)
    assert backend.count == 2
    assert relative_error(first, second) > 1e-3
    assert relative_error(second, gm(batch)) < 1e-5


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        pytest.param("rotary ViT", False, marks=pytest.mark.slow),
        *(pytest.param("ConvNeXt", last, marks=pytest.mark.slow) for last in (False, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ViT", False), ("Swin", True))),
    ],
)
@torch.no_grad()
def test_inductor_keeps_the_same_positions(name, channels_last):
    _, gm, shape = pair(name)
    batch = torch.randn(3, *shape)
    if channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    nodes = [node for node in gm.graph.nodes if node.name.startswith("papr_keep")]
    output = gm.graph.output_node().all_input_nodes[0]
    both = cut(gm, gm.graph, *nodes, output)
    torch.compiler.reset()
    *kept, out = torch.compile(both, fullgraph=True)(batch)
    *expected, reference = both(batch)
    for found, wanted in zip(kept, expected, strict=True):
        assert torch.equal(found.sort(1).values, wanted.sort(1).values)
    assert relative_error(out, reference) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNeXt", "torchvision Swin"])
@torch.no_grad()
def test_compiles_as_one_graph_in_inductor(name):
    family = FAMILIES[name]
    model = family.model().float()
    x = torch.randn(2, 3, *family.size)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    torch.compiler.reset()
    compiled = torch.compile(gm, fullgraph=True)
    assert relative_error(compiled(x), gm(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_modes(mode):
    _, gm, shape = pair("ViT")
    batch = torch.randn(2, *shape)
    torch.compiler.reset()
    assert relative_error(torch.compile(gm, mode=mode, fullgraph=True)(batch), gm(batch)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ViT", "ConvNeXt"])
@torch.no_grad()
def test_scores_are_float32_under_autocast(name, dtype):
    """In half precision many scores would tie, and the choice between them would be arbitrary."""
    _, gm, shape = pair(name)
    batch = torch.randn(2, *shape)
    psm = next(node for node in gm.graph.nodes if node.name.startswith("papr_psm"))
    with torch.autocast("cpu", dtype=dtype):
        assert cut(gm, gm.graph, psm)(batch).dtype == torch.float32
        assert papr_fx.significance(gm, batch).dtype == torch.float32
        torch.compiler.reset()
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(batch).float(), gm(batch).float()) < 0.05
    whole = gm.to(dtype)
    assert cut(whole, whole.graph, psm)(batch.to(dtype)).dtype == torch.float32
    assert bool(whole(batch.to(dtype)).isfinite().all())


def test_a_compiled_training_step_has_the_eager_gradients():
    model, gm, _ = pair("ViT")
    gm.train()
    for module in gm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = images(Shape(), 2, dtype=torch.float32)
    expected = torch.autograd.grad(gm(batch).square().sum(), list(model.parameters()), allow_unused=True)
    torch.compiler.reset()
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(batch).square().sum(), list(model.parameters()), allow_unused=True)
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None]
    assert len(pairs) > 10
    assert max(relative_error(a, e) for a, e in pairs) < 1e-4
