"""What a user may do to a token stream, third part: odd tables, tokens in parts, the batch, content as a condition."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixing import Mixing, Trap
from .positions import Sizes
from .views import View


class TransposedTable(Trap):
    """Adds a table (C, N) to transposed tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.table = nn.Parameter(torch.zeros(sizes.width, sizes.tokens))

    def forward(self, x: Tensor) -> Tensor:
        return (x.transpose(1, 2) + self.table).transpose(1, 2)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.rows(self.table.T), view


class FlatTable(Trap):
    """Adds a table (N * C) to tokens in one row."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.table = nn.Parameter(torch.zeros(1, sizes.tokens * sizes.width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) + self.table).view(x.shape)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.rows(self.table.view(-1, x.shape[-1])), view


class LookedUp(Trap):
    """Looks a table up by numbers that are kept in a buffer."""

    numbers: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.table = nn.Embedding(sizes.tokens, sizes.width)
        self.register_buffer("numbers", torch.arange(sizes.tokens - 1, -1, -1).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.numbers)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.rows(self.table.weight.flip(0)), view


class SomeScaled(Trap):
    """Multiplies by a table (N, 1) that is one for most tokens."""

    scales: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.register_buffer("scales", torch.ones(sizes.tokens, 1))
        self.scales[sizes.prefix + sizes.patches // 2] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.scales, x)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x * view.rows(self.scales), view


class InParts(Trap):
    """Treats the prefix and the patches apart, and joins them again."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.sizes.prefix], x[:, self.sizes.prefix :]
        return torch.cat([first * 0.5, rest.tanh()], dim=1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        prefix = self.sizes.prefix
        first, rest = view.part(x, 0, prefix), view.part(x, prefix, None)
        return torch.cat([first * 0.5, rest.tanh()], dim=1), view


class InFixedParts(InParts):
    """The same by `split`, with the counts written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split([self.sizes.prefix, self.sizes.tokens - self.sizes.prefix], dim=1)
        return torch.cat([first * 0.5, rest.tanh()], dim=1)


class Halves(Mixing):
    """Treats the first half of the tokens in another way than the second."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.tensor_split(2, dim=1)
        return torch.cat([one * 0.5, other.tanh()], dim=1)


class Alternate(Mixing):
    """Scales every other token."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, ::2] *= 0.5
        return x


class OneByOne(Trap):
    """Walks over the tokens in a Python loop."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([token.tanh() for token in x.unbind(1)], dim=1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.tanh(), view


class LastAdded(Trap):
    """Adds the last token to all."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[:, -1:].sigmoid()

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.read(x, -1).unsqueeze(1).sigmoid(), view


class Smoothed(Mixing):
    """Averages each token with its neighbours in the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


class Sequential1d(Mixing):
    """A convolution over the sequence."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.conv = nn.Conv1d(sizes.width, sizes.width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class BatchRolled(Trap):
    """Hands each image the tokens of another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 0)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        sizes = None if view.sizes is None else view.sizes.roll(1, 0)
        return x.roll(1, 0), replace(view, take=view.take.roll(1, 0), sizes=sizes)


class BatchMean(Mixing):
    """Adds the mean over the images, token by token."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=0, keepdim=True)


class BatchLast(Trap):
    """Moves the batch behind the channels and back."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(1, 2, 0).contiguous()  # (N, C, B)
        return (y.sin() + y).permute(2, 0, 1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.sin() + x, view


class ByContent(Mixing):
    """Takes another path where the mean over everything is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5 if bool(x.mean() > 0) else x.tanh()


class Clipped(Trap):
    """Sets tokens with small norms to zero, each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.norm(dim=-1, keepdim=True) > 1.0)


class Relative(Mixing):
    """Divides by the largest norm of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1).amax(dim=1)[:, None, None]


class Looped(Trap):
    """Writes each token in a loop over a size."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(x.shape[1]):
            out[:, number] = x[:, number].sigmoid()
        return out

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.sigmoid(), view


KINDS: tuple[type[Trap], ...] = (
    TransposedTable, FlatTable, LookedUp, SomeScaled, InParts, InFixedParts, Halves, Alternate, OneByOne, LastAdded, Smoothed,
    Sequential1d, BatchRolled, BatchMean, BatchLast, ByContent, Clipped, Relative, Looped,
)  # fmt: skip
