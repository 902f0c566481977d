"""Small clip models and a clip proposal."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from .vits import Attention, Block, enliven

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 48}


def clip_proposal() -> nn.Sequential:
    """A 3-D ConvNet without a head. Its map has the resolution of the clips, so no two scores tie."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Tanh(), nn.Conv3d(4, 5, 3, padding=1))


def huggingface(name: str, **options: object) -> nn.Module:
    kind = getattr(transformers, name)
    return enliven(kind._from_config(kind.config_class(**SMALL, num_frames=6, **options))).double().eval()


class ClipViT(nn.Module):
    """A clip ViT as users write them: tubelets of (B, C, T, H, W), prefix tokens, position table, two blocks."""

    def __init__(self, grid: tuple[int, int, int], prefix: int) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (2, 4, 3), (2, 4, 3))
        self.first = nn.Parameter(torch.zeros(1, prefix, 8))
        self.pos = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1] * grid[2], 8))
        self.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))
        self.head = nn.Linear(8, 7)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class JointViT(ClipViT):
    """Embeds every frame as an image and joins the tokens of all frames: at once, or in two steps."""

    def __init__(self, prefix: int, *, at_once: bool) -> None:
        super().__init__((4, 3, 2), prefix)
        self.embed = nn.Conv2d(3, 8, (4, 3), (4, 3))
        self.at_once = at_once
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, _, _ = x.shape
        x = self.embed(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)  # (B * t, n, C)
        x = x.reshape(b, t * x.shape[1], 8) if self.at_once else x.unflatten(0, (b, t)).flatten(1, 2)
        x = torch.cat([self.first.expand(b, -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class PatchMajor(JointViT):
    """Orders tokens by patch first, then by frame."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, _, _ = x.shape
        x = self.embed(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (b, t)).transpose(1, 2).flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))
