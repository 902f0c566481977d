"""What a user may do to a token stream between two layers, first part: norms, sums and whatever else mixes tokens.

`seen` gives the tokens of the oracle and their view, or raises `UndefinedError`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import Sizes
from .views import View


class Trap(nn.Module):
    """Something that is done to tokens (B, N, C). The base does nothing."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        """The oracle. The base stands for what treats each token by itself."""
        return self(x), view


class Mixing(Trap):
    """What mixes tokens outside attention."""

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        view.need_all(type(self).__name__)
        return self(x), view


class TokenNorm(Mixing):
    """LayerNorm over the tokens, in place of the channels."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.norm = nn.LayerNorm(sizes.tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x.transpose(1, 2)).transpose(1, 2)


class ScaleFreeNorm(Mixing):
    """Divides by the deviation over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.std(dim=1, keepdim=True) + 0.1)


class TokenBatchNorm(Trap):
    """BatchNorm1d whose channels are the tokens: a table of positions in eval mode."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.norm = nn.BatchNorm1d(sizes.tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        rows = view.rows(torch.stack([scale, norm.bias - norm.running_mean * scale], 1))
        return x * rows[..., :1] + rows[..., 1:], view


class ChannelBatchNorm(Trap):
    """BatchNorm1d over the channels: treats each token by itself in eval mode."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.norm = nn.BatchNorm1d(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Response(Mixing):
    """A global response norm over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=1, keepdim=True)
        return x + x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))


class Mixer(Mixing):
    """The token mixing of an MLP-Mixer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.mix = nn.Linear(sizes.tokens, sizes.tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class MeanAdded(Mixing):
    """Adds the mean token to each."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class LargestAdded(Mixing):
    """Adds the maximum over the tokens to each."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.amax(x, dim=1, keepdim=True)


class CumulativeSum(Mixing):
    """Adds a running mean of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.cumsum(dim=1) * 0.3


class Shifted(Mixing):
    """Each token takes half of its channels from its neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one, F.pad(other, (0, 0, 1, 0))[:, :-1]], dim=-1)


class Gated(Mixing):
    """A softmax over the tokens that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(dim=1) * 4


class Context(Trap):
    """Global context: the tokens' weighted mean is added to each. It is an attention with one query."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.score, self.value = nn.Linear(sizes.width, 1), nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)
        return x + (weights * self.value(x)).sum(dim=1, keepdim=True)


class LeastSubtracted(Mixing):
    """Subtracts the first patch from all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.sizes.prefix
        return x - x[:, first : first + 1]


class FirstAdded(Trap):
    """Adds the first token to all: a class token, if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[:, :1].sigmoid()

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        return x + view.read(x, 0).unsqueeze(1).sigmoid(), view


KINDS: tuple[type[Trap], ...] = (
    TokenNorm, ScaleFreeNorm, TokenBatchNorm, ChannelBatchNorm, Response, Mixer, MeanAdded, LargestAdded,
    CumulativeSum, Shifted, Gated, Context, LeastSubtracted, FirstAdded,
)  # fmt: skip
