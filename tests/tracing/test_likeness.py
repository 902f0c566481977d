"""Like modules and nodes are run and judged once: what is found is what each would give by itself."""

import copy
from collections import deque
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

import papr_fx
from papr_fx.tracing.likeness import form_of, kinds_of_modules
from papr_fx.tracing.macs import count_macs
from papr_fx.tracing.results import shared_results
from papr_fx.tracing.trace import trace

from ..models import toy_proposal


def kinds(*modules: nn.Module) -> list[int]:
    found = kinds_of_modules(nn.ModuleList(modules))
    return [found[module] for module in modules]


def norm(table: Tensor) -> nn.Module:
    module = nn.LayerNorm(4)
    module.register_buffer("table", table)
    return module


def held(value: object) -> nn.Module:
    module = nn.Identity()
    module.value = value
    return module


class Numbers(list[int]):
    """A list with an attribute of its own."""

    def __init__(self, step: int) -> None:
        super().__init__([1, 2])
        self.step = step


class Slotted(nn.Identity):
    __slots__ = ("step",)


def test_modules_that_differ_in_the_content_of_parameters_are_alike():
    a, b = nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sequential(nn.Linear(4, 4), nn.GELU())
    assert len(set(kinds(a, b))) == 1
    assert len(set(kinds(norm(torch.ones(2)), norm(torch.ones(2))))) == 1


def test_a_shared_tensor_is_like_no_other():
    first, second, third, fourth = (nn.Linear(4, 4) for _ in range(4))
    second.weight = first.weight
    fourth.weight = third.weight
    found = kinds(first, second, third, fourth)
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 8), nn.Linear(4, 4, dtype=torch.float64)],
        [nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.1).eval(), nn.Dropout1d(0.1), nn.Dropout(1), nn.Dropout(True)],
        [norm(torch.ones(2)), norm(torch.zeros(2)), norm(torch.ones(3)), norm(torch.ones(2, dtype=torch.bfloat16))],
        [nn.Sequential(nn.ReLU(), nn.GELU()), nn.Sequential(nn.GELU(), nn.ReLU()), nn.Sequential(nn.ReLU())],
        [held(value) for value in (torch.ones(2), torch.zeros(2), nn.Parameter(torch.ones(2).int(), requires_grad=False))],
        [held(Numbers(1)), held(Numbers(2)), held([1, 2]), held((1, 2))],
        [Slotted(), Slotted()],
    ],
)
def test_other_modules_are_not(modules):
    assert len(set(kinds(*modules))) == len(modules)


def test_forms_of_what_holds_itself_and_of_unknown_objects():
    endless: list[object] = []
    endless.append(endless)
    assert form_of(endless, {}) == form_of(endless, {})
    assert form_of(object(), {}) != form_of(object(), {})
    assert form_of(partial(max, 1), {}) == form_of(partial(max, 1), {}) != form_of(partial(max, 2), {})
    assert form_of({"a": (1, {2})}, {}) == form_of({"a": (1, {2})}, {}) != form_of({"a": (1, {True})}, {})


class Turning(nn.Module):
    """Pools by another factor at every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.step % 2 + 1
        return F.avg_pool2d(x, self.step)


class Joined(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return q if q is k else torch.cat([q, k], dim=-1)


class Lifted(nn.Module):
    """Changes the shape of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x.unsqueeze_(1)
        return x.sum(1)


class Leaves(nn.Module):
    """Modules whose results follow from more than the shapes of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.turn, self.joined, self.lifted = Turning(), Joined(), Lifted()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(1, 16, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.new_tensor(8).item(), x.new_tensor(4).item()
        x = self.stem(x)
        x = self.turn(self.turn(x)).flatten(2).transpose(1, 2)
        one, two = self.one(x), self.two(x)
        both = self.joined(one, two)
        lifted = self.lifted(one)
        table = self.table[:, : int(height), : int(width)].flatten(1, 2).mean(1)
        return torch.cat([both.mean(1), lifted.mean(1), two.mean(1), table.expand(len(both), -1)], dim=1)


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean(3)
        y = x.contiguous()
        y.unsqueeze_(1)
        return x.sum(1)


class Patches(nn.Module):
    """Blocks of one class that give other shapes, by an attribute, by a list that grows, and by a change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.pools = nn.ModuleList([nn.AvgPool2d(1), nn.AvgPool2d(1), nn.AvgPool2d(2)])
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = []
        for pool, mix in zip(self.pools, self.mixes, strict=True):
            x = mix(pool(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            kept.append(x.mean(dim=(2, 3)))
        one, two = self.mixes[0](kept[0]), self.mixes[1](kept[1])
        one.unsqueeze_(1)
        return torch.cat([one.flatten(1), two, kept[2]], dim=1) + len(kept)


MODELS = {
    "toy": Patches,
    "leaves": Leaves,
    "alias": Alias,
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 3), embed_dim=24),
    "davit": lambda: timm.create_model("davit_tiny", depths=(1, 2, 1, 1), embed_dims=(24, 48, 96, 192), num_heads=(1, 2, 4, 8)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_shapes_are_those_of_a_run(name, shared):
    model = MODELS[name]().eval()
    images = torch.randn(2, 3, 64, 64)

    def traced() -> tuple[object, ...]:
        return (
            trace(model, images[:1], lambda module, _: bool(list(module.children()))),
            trace(model, images[:1], lambda module, path: not path or path.count(".") == 0),
        )

    if shared:
        with shared_results():
            traced()
            found = traced()
    else:
        found = traced()
    for recorded in found:
        gm = recorded.module(model)
        nodes = copy.deepcopy(recorded.graph).nodes
        with torch.no_grad():
            ShapeProp(gm).propagate(images)
        for node, run in zip(nodes, gm.graph.nodes, strict=True):
            meta = run.meta.get("tensor_meta")
            if hasattr(meta, "shape") and node.op != "output":
                assert (node.meta["shape"], node.meta["dtype"]) == (tuple(meta.shape), meta.dtype), node


class Flat(Alias):
    """Computes what `Alias` does before it changes a shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).mean(3).contiguous().sum(1)


def test_a_shape_that_one_model_changes_is_not_that_of_another():
    images = torch.zeros(1, 3, 64, 64)
    with shared_results():
        trace(Alias(), images, lambda *_: False)
        shapes = [node.meta.get("shape") for node in trace(Flat(), images, lambda *_: False).graph.nodes]
    assert shapes[2:5] == [(2, 8, 16), (2, 8, 16), (2, 16)]


class Norms(nn.Module):
    """Residual branches of one class: the norm of one is over space, by an attribute that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Branch(over_space) for over_space in (False, True, False)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


class Branch(nn.Module):
    def __init__(self, over_space: bool) -> None:
        super().__init__()
        self.over_space = over_space
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(dim=(2, 3), keepdim=True) if self.over_space else x)


def test_modules_that_differ_in_an_attribute_are_judged_by_themselves():
    gm = papr_fx.transform(Norms().eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 32, 32))
    assert [site.addition for site in gm.plan.eval.sites] == ["add", "add_2"]


class Blur(nn.Module):
    """Blurs its input with a kernel that is neither parameter nor buffer."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.expand(8, 1, 3, 3), padding=1, groups=8)


def test_modules_that_differ_in_a_plain_tensor_are_judged_by_themselves():
    point = torch.zeros(3, 3)
    point[1, 1] = 1
    model = Norms()
    kernels = (point, torch.ones(3, 3), point.clone())
    model.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), Blur(kernel)) for kernel in kernels])
    gm = papr_fx.transform(model.eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 32, 32))
    assert [site.addition for site in gm.plan.eval.sites] == ["add", "add_2"]


class Alternating(nn.Module):
    """Its layer runs once on odd calls and twice on even ones. It keeps its calls in a container."""

    def __init__(self, calls) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), calls

    def forward(self, x: Tensor) -> Tensor:
        getattr(self.calls, "append", getattr(self.calls, "add", None))(len(self.calls))
        return self.layer(x) if len(self.calls) % 2 else self.layer(self.layer(x))


class CalledTwice(nn.Module):
    def __init__(self, calls) -> None:
        super().__init__()
        self.inner = Alternating(calls)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


@pytest.mark.parametrize("calls", [list, set, deque])
def test_a_module_whose_containers_grow_is_run_each_time(calls):
    module = CalledTwice(calls())
    opaque = trace(module, torch.zeros(1, 4, 8), lambda module, name: False).module(module)
    assert [node.target for node in opaque.graph.find_nodes(op="call_module")] == ["inner", "inner"]
    assert count_macs(opaque, torch.zeros(1, 4, 8)) == 3 * 4 * 8 * 8
