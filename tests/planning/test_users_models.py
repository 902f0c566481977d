"""Vision transformers as users write them: pruned, each equals the model run on the kept tokens."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal
from ..models.vits import BatchNormStem, SinCos
from ..oracles import at_first_block, kept_tokens


class InPlace(ToyViT):
    """Adds its position table and scales its tokens in place."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def tokens(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.first.expand(x.shape[0], -1, -1), self.patches(x)], dim=1)
        tokens.add_(self.pos)
        tokens.mul_(1.5)
        return tokens


class Pairs(ToyViT):
    """Each layer is a list of an attention and an MLP."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(8, 2, True), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.classify(x)


class TwoLists(ToyViT):
    """Attentions and MLPs are in separate lists; the MLPs are larger."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.attentions = nn.ModuleList(Attention(8, 2, True) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.classify(x)


class Tied(ToyViT):
    """One block, used three times."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.blocks = nn.ModuleList([Block(8, Attention(8, 2, True))] * 3)


class Looped(ToyViT):
    """One block, called in a loop, and no list."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.block = Block(8, Attention(8, 2, True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for _ in range(2):
            x = self.block(x)
        return self.classify(x)


class TupleBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class TupleBlocks(ToyViT):
    """Blocks return a tuple of tokens and None."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.blocks = nn.ModuleList(TupleBlock(8, Attention(8, 2, True)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.classify(x)


class OtherFirstBlock(ToyViT):
    """The MLP of the first block has another width."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=3, prefix=0))
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


class FirstBlock(Block):
    """A block of another class."""


class OtherClassFirst(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape(depth=3))
        self.blocks[0] = FirstBlock(8, Attention(8, 2, True))


class Normalised(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        nn.utils.parametrizations.weight_norm(self.blocks[0].attn.qkv)


class Pyramid(nn.Conv2d):
    """Returns a list of maps, as feature backbones do."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, super().forward(x)]


class HybridEmbedding(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        if isinstance(x, list | tuple):
            x = x[-1]
        return x.flatten(2).transpose(1, 2)


class Hybrid(ToyViT):
    """No position table, and an embedding that checks whether its backbone returns one map or several."""

    def __init__(self) -> None:
        super().__init__(Shape(prefix=0))
        self.proj = HybridEmbedding(Pyramid(3, 8, self.shape.patch, self.shape.patch))

    def tokens(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Dictionary(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


MODELS = {
    SinCos: "blocks.0",
    InPlace: "blocks.0",
    BatchNormStem: "blocks.0",
    Tied: "blocks.0",
    Looped: "block",
    TupleBlocks: "blocks.0",
    OtherFirstBlock: "blocks.0",
    OtherClassFirst: "blocks.0",
    Normalised: "blocks.0",
    Hybrid: "blocks.0",
    Dictionary: "blocks.0",
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_equals_the_model_on_the_kept_tokens(build):
    model = enliven(build()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    prefix = papr_fx.report(gm).sites[0].prefix
    x = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        (mask,) = papr_fx.keep_masks(gm, x).values()
        assert relative_error(gm(x), at_first_block(model, MODELS[build], kept_tokens(mask, prefix), x)) < 1e-12


@pytest.mark.parametrize("build", [SinCos, InPlace, Pairs, TwoLists, Tied], ids=lambda build: build.__name__)
def test_kept_tokens_equal_those_of_the_model_with_hidden_keys(build):
    assert check(enliven(build()), toy_proposal(), 0.5).hidden_keys < 1e-9


class Labels(ToyViT):
    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "label": logits.argmax(1), "sure": logits.amax(1) > 0}


def test_outputs_that_are_not_floating_point():
    gm = papr_fx.transform(Labels(Shape()).eval(), toy_proposal(), 0.5)
    out = gm(images(Shape(), 2, dtype=torch.float32))
    assert torch.equal(out["label"], out["logits"].argmax(1))
