"""What a user may do to a token stream, second part: moves, writing in place, reading of sizes; and the list of all.

`seen` gives the tokens of the oracle and their view, or raises `UndefinedError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import mixing, reading
from .mixing import Mixing, Trap
from .positions import Sizes
from .views import UndefinedError, UnjudgedError, View


class Rolled(Trap):
    """Rolls the tokens by one and leaves them so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.roll(1, 1), view.rolled(1)


class ClassLast(Trap):
    """Moves the first token behind the others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.roll(-1, 1), view.rolled(-1)


class Flipped(Trap):
    """Reverses the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.flip(1), view.flipped()


class Sorted(Trap):
    """Sorts the tokens by their first channel."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, :, 0].argsort(dim=1)
        return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return self(x), view if view.whole else view.without_order()


class BestHalf(Mixing):
    """Adds the mean of the half with the largest norms."""

    def forward(self, x: Tensor) -> Tensor:
        best = x.norm(dim=-1).topk(self.sizes.tokens // 2, dim=1).indices
        return x + x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1])).mean(1, keepdim=True)


class AddedInPlace(Trap):
    """Works in place on its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.bias = nn.Parameter(torch.zeros(sizes.width))

    def forward(self, x: Tensor) -> Tensor:
        x.add_(self.bias)
        x *= 0.7
        return x

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return (x + self.bias) * 0.7, view


class FirstWritten(Trap):
    """Writes to the first token in place."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.token = nn.Parameter(torch.zeros(sizes.width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = x[:, 0] + self.token
        return x

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return torch.cat([view.read(x, 0).unsqueeze(1) + self.token, x[:, 1:]], 1), view


class Dropped(Trap):
    """Dropout as a function, off in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=self.training)


class AlwaysDropped(Trap):
    """Dropout as a function whose flag is forgotten: it is on in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        raise UndefinedError("random numbers in eval mode")


class WholeSizes(Trap):
    """Reads its sizes as Python numbers."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = int(x.shape[0]), int(x.size(1)), int(x.shape[2])
        return x.reshape(b * n, c).tanh().view(b, n, c)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.tanh(), view


class FixedCount(Trap):
    """Views its tokens with their count written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.sizes.tokens * self.sizes.width).sigmoid().view(-1, self.sizes.tokens, self.sizes.width)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.sigmoid(), view


class Branching(Trap):
    """Another path for many tokens than for few. The dense model's is meant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.7 if x.shape[1] >= self.sizes.tokens else x

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x * 1.7, view


class CountScaled(Trap):
    """Scales by the number of tokens. The dense model's is meant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.shape[1] / 10)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x * (self.sizes.tokens / 10), view


class Counting(Trap):
    """Counts its calls in a buffer, which nothing reads."""

    calls: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin()

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x.sin(), view


class Remembering(Counting):
    """Scales by the number of its calls so far."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        raise UnjudgedError("an output that depends on the number of calls")


class Table(Trap):
    """Adds a table of positions once more."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.table = nn.Parameter(torch.zeros(1, sizes.tokens, sizes.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.rows(self.table[0]), view


class Numbered(Trap):
    """Scales each token by a function of its number, which is computed in forward."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return x * (1 + 0.5 * torch.sin(numbers)).unsqueeze(-1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        numbers = torch.arange(self.sizes.tokens, dtype=x.dtype)
        return x * view.rows((1 + 0.5 * numbers.sin()).unsqueeze(-1)), view


class Convolved(Mixing):
    """A depthwise convolution on the grid of the patches (positional encoding of CPVT)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.conv = nn.Conv2d(sizes.width, sizes.width, 3, padding=1, groups=sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        end = x.shape[1] - self.sizes.suffix
        first, rest, last = x[:, : self.sizes.prefix], x[:, self.sizes.prefix : end], x[:, end:]
        rows = self.sizes.patches // self.sizes.grid[-1]
        maps = rest.transpose(1, 2).reshape(x.shape[0], -1, rows, self.sizes.grid[-1])
        return torch.cat([first, rest + self.conv(maps).flatten(2).transpose(1, 2), last], dim=1)


_OWN: tuple[type[Trap], ...] = (
    Rolled, ClassLast, Flipped, Sorted, BestHalf, AddedInPlace, FirstWritten, Dropped, AlwaysDropped, WholeSizes, FixedCount,
    Branching, CountScaled, Counting, Remembering, Table, Numbered, Convolved,
)  # fmt: skip
KINDS: dict[str, Callable[[Sizes], Trap]] = {kind.__name__: kind for kind in (*mixing.KINDS, *_OWN, *reading.KINDS)}
HARMLESS = (
    "ChannelBatchNorm", "AddedInPlace", "Dropped", "WholeSizes", "Table", "Numbered", "Counting",
    "TransposedTable", "LookedUp", "SomeScaled", "InParts", "BatchLast", "Clipped",
)  # fmt: skip
