"""Models that change their images, or in which other parts read what their patches become."""

from __future__ import annotations

from torch import Tensor, nn

from .vits import Shape, ToyViT, enliven


class Twice(ToyViT):
    """Patches are embedded by two convolutions; another part of the model reads what the last one makes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.other = nn.Conv2d(3, self.proj.out_channels, self.proj.kernel_size, self.proj.stride)
        enliven(self)

    def patches(self, x: Tensor) -> Tensor:
        tokens, other = super().patches(x), self.other(x)
        self.mean = other.mean((2, 3))
        return tokens + other.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mean.mean(1, keepdim=True)


class Rescaled(ToyViT):
    """Changes the images that it is given."""

    def patches(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().patches(x)


class Skips(ToyViT):
    """Adds the input of the first block to the output of the last."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x + first)
