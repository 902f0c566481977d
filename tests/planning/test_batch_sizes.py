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


@pytest.mark.parametrize("mode", ["auto", "tokens"])
@pytest.mark.parametrize(("build", "name"), [(OneByOne, "getitem"), (EachImage, "x")])
def test_a_batch_size_that_is_read_is_refused(build, name, mode):
    line = inspect.getsourcelines(build.forward)[1] + 1
    place = rf"`{name}` \(test_batch_sizes.py, line {line}\)"
    with pytest.raises(papr_fx.TraceError, match=f"reads .*{place} as a Python number or length"):
        papr_fx.transform(build().eval(), toy_proposal(), 0.5, mode=mode, verify=False)
