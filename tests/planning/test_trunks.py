"""The trunk is the part whose blocks run on tokens, wherever it lies in a model and whatever is larger than it."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import at_first_block, kept_tokens


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 200), nn.GELU(), nn.Linear(200, out))


class Teacher(nn.Module):
    """The teacher is larger, and only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = ToyViT(Shape()), ToyViT(Shape(depth=5))

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


class Ensemble(nn.Module):
    """A list of models whose answers are averaged."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


class Convolutions(nn.Sequential):
    """A classifier without tokens, larger than a toy ViT."""

    def __init__(self) -> None:
        stages = [nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GELU()) for _ in range(4)]
        super().__init__(nn.Conv2d(3, 64, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7))


class Decoded(ToyViT):
    """Its decoder is larger than the trunk, and runs on the same tokens with more channels."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.decoder = nn.ModuleList(Block(32, Attention(32, 4, True)) for _ in range(4))
        self.before, self.after = nn.Linear(8, 32), nn.Linear(32, 8)

    def classify(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.decoder:
            x = block(x)
        return super().classify(self.after(x))


class Headed(nn.Module):
    """A list of heads, each larger than the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(mlp(7, 5) for _ in range(3))
        self.trunk = ToyViT(Shape())

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.stack([head(features) for head in self.heads])


class InParts(ToyViT):
    """A trunk in several lists, of one block and more, in the order in which they run or another."""

    def __init__(self, *depths: int, backwards: bool = False) -> None:
        super().__init__(Shape(depth=sum(depths)))
        blocks = iter([*self.blocks])
        lists = [nn.ModuleList(next(blocks) for _ in range(depth)) for depth in depths]
        del self.blocks
        self.names = [f"part{number}" for number in range(len(depths))]
        parts = [*zip(self.names, lists, strict=True)]
        for name, part in reversed(parts) if backwards else parts:
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for name in self.names:
            for block in getattr(self, name):
                x = block(x)
        return self.classify(x)


class Convolving(Block):
    """A block that may convolve the grid of its tokens in front of its MLP (CPVT)."""

    def __init__(self, *, convolves: bool) -> None:
        super().__init__(8, Attention(8, 2, True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1) if convolves else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if self.conv is not None:
            grid = x[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
            x = torch.cat([x[:, :1], x[:, 1:] + self.conv(grid).flatten(2).transpose(1, 2)], dim=1)
        return x + self.mlp(self.norm2(x))


def test_a_block_with_more_in_it_is_one_of_the_trunk():
    """Else what it does with the grid would be taken for that of a dense head, which reads filled places."""
    model = InParts(1, 1)
    model.part0[0], model.part1[0] = Convolving(convolves=False), Convolving(convolves=True)
    with pytest.raises(papr_fx.NoSiteError, match="a reshape to the grid inside a block"):
        papr_fx.transform(enliven(model).eval(), toy_proposal(), 0.5, mode="tokens")


FIRST_BLOCKS = {
    "one block, then two": (lambda: InParts(1, 2), "part0.0"),
    "two blocks, then one": (lambda: InParts(2, 1), "part0.0"),
    "three parts": (lambda: InParts(1, 2, 3), "part0.0"),
    "parts listed backwards": (lambda: InParts(1, 3, backwards=True), "part0.0"),
    "wrapped": (lambda: nn.Sequential(ToyViT(Shape())), "0.blocks.0"),
    "wrapped twice": (lambda: nn.Sequential(nn.Sequential(ToyViT(Shape()))), "0.0.blocks.0"),
    "one block": (lambda: nn.Sequential(ToyViT(Shape(depth=1))), "0.blocks.0"),
    "after a norm": (lambda: nn.Sequential(nn.BatchNorm2d(3), ToyViT(Shape())), "1.blocks.0"),
    "before a probe": (lambda: nn.Sequential(ToyViT(Shape()), mlp(7, 7)), "0.blocks.0"),
    "before many layers": (lambda: nn.Sequential(ToyViT(Shape()), nn.Sequential(*[mlp(7, 7)] * 6)), "0.blocks.0"),
    "in a list": (lambda: Ensemble(ToyViT(Shape())), "models.0.blocks.0"),
    "beside convolutions": (lambda: Ensemble(Convolutions(), ToyViT(Shape())), "models.1.blocks.0"),
    "student": (Teacher, "student.blocks.0"),
    "large decoder": (Decoded, "blocks.0"),
    "large heads": (Headed, "trunk.blocks.0"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FIRST_BLOCKS)
@torch.no_grad()
def test_trunk(name):
    build, block = FIRST_BLOCKS[name]
    model = enliven(build()).double().eval()
    x = images(Shape(), 3)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    found = papr_fx.report(gm)
    assert (found.mode, found.sites[0].name.split(" -> ")[1]) == ("tokens", block)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    assert relative_error(gm(x), at_first_block(model, block, kept_tokens(mask, 1), x)) < 1e-12
    assert relative_error(gm(x), at_first_block(model, block, kept_tokens(mask.roll(1, 0), 1), x)) > 1e-6


@pytest.mark.parametrize(("depth", "width"), [(2, 8), (3, 8), (3, 12)])
@pytest.mark.parametrize("mode", ["auto", "tokens"])
def test_two_trunks_are_refused(depth, width, mode):
    model = Ensemble(ToyViT(Shape()), ToyViT(Shape(depth=depth), width)).eval()
    with pytest.raises(papr_fx.NoSiteError, match=r"`models\.\d`.*Transform each by itself") as caught:
        papr_fx.transform(model, toy_proposal(), 0.5, example_input=images(Shape(), 1, dtype=torch.float32), mode=mode)
    assert "mode='pixels'" not in str(caught.value)


def test_two_trunks_can_be_transformed_one_by_one():
    model = Ensemble(ToyViT(Shape()), ToyViT(Shape(depth=3))).eval()
    x = images(Shape(), 2, dtype=torch.float32)
    pruned = [papr_fx.transform(part, toy_proposal(), 0.5) for part in model.models]
    expected = torch.stack([part(x) for part in pruned]).mean(0)
    model.models = nn.ModuleList(pruned)
    assert torch.equal(model(x), expected)
