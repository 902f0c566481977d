"""Models whose code computes with the batch size: it stays a value of the graph, or is refused by name."""

import inspect

import pytest
import torch
from torch import Tensor, nn

import papr_fx

from ..models import Attention, enliven, toy_proposal
from .test_image_sizes import AnySize


def windows(x: Tensor, side: int) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // side, side, w // side, side, c).transpose(2, 3).reshape(-1, side * side, c)


def joined(x: Tensor, side: int, h: int, w: int) -> Tensor:
    """Computes the batch size from the number of windows, as the authors' Swin does."""
    b = int(x.shape[0] / (h * w / side / side))
    return x.view(b, h // side, w // side, side, side, -1).transpose(2, 3).reshape(b, h, w, -1)


class WindowBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(8, 2, True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        x = x + joined(self.attn(windows(x, 2)), 2, h, w)
        return x + self.mlp(x)


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(WindowBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))


@torch.no_grad()
def test_a_batch_size_that_python_computes():
    model = enliven(Windowed()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 16, 16))
    assert len(papr_fx.report(gm).sites) == 2
    papr_fx.set_keep_ratio(gm, 1.0)
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (3, 3, 24, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(gm(x), model(x))


class OneByOne(AnySize):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(OneByOne, self).forward(x[i : i + 1])[0] for i in range(x.shape[0])])


class EachImage(AnySize):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(EachImage, self).forward(image[None])[0] for image in x])


class Branching(AnySize):
    """Doubles its output where a condition on the images holds."""

    def __init__(self, condition) -> None:
        super().__init__()
        self.condition = condition
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return 2 * out if self.condition(self, x) else out


# All of them are as false for two images as for three.
BRANCHES = {
    "one": lambda model, x: x.shape[0] == 1,
    "many": lambda model, x: len(x) > 4,
    "maximum": lambda model, x: max(len(x), 8) > 8,
    "steps": lambda model, x: len(range(0, max(len(x), 4), 4)) > 1,
    "quotient": lambda model, x: x.shape[0] // 4,
    "remainder": lambda model, x: len(x) % 7 == 0,
    "set": lambda model, x: len(x) in {8, 16},
    "dictionary": lambda model, x: {8: True}.get(x.shape[0]),
}


@pytest.mark.parametrize("condition", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_a_batch_size_is_refused_whatever_the_size(condition):
    with pytest.raises(papr_fx.TraceError, match=r"reads .*\(planning/test_batch_sizes.py, line \d+\)"):
        papr_fx.transform(enliven(Branching(condition)).eval(), toy_proposal(), 0.5, verify=False)


@pytest.mark.parametrize(
    "condition",
    [
        lambda model, x: x.shape[0] > 0 and len(x) == x.flatten(1).shape[0],
        lambda model, x: [False] * len(model.table) == [False] * 4 and isinstance(len(model.table), int),
        lambda model, x: {4: True}[len(model.table)] and {3: True}[x.shape[1]],
    ],
)
def test_what_is_the_same_for_all_batch_sizes_is_not(condition):
    model = enliven(Branching(condition)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0, verify=False)
    for batch in (1, 5, 8):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("mode", ["auto", "tokens"])
@pytest.mark.parametrize(("build", "name"), [(OneByOne, "getitem"), (EachImage, "x")])
def test_a_batch_size_that_is_read_is_refused(build, name, mode):
    line = inspect.getsourcelines(build.forward)[1] + 1
    place = rf"`{name}` \(planning/test_batch_sizes.py, line {line}\)"
    with pytest.raises(papr_fx.TraceError, match=f"reads .*{place} as a Python number or length"):
        papr_fx.transform(build().eval(), toy_proposal(), 0.5, mode=mode, verify=False)
