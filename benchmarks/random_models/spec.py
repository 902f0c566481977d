"""What a random model is made of: one flat description, from which the model follows and which is shrunk field by field."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A model, its proposal and the options of its rewrite. The defaults are the plainest choice for each.

    Attributes:
        seed: Of weights and images.
        trunk: "vit", "clip", "conv", "windows" or "hybrid".
        grid: Patches: (rows, columns), or (frames, rows, columns); of grids of convolutions and windows, positions.
        patch: Rows and columns of pixels in a patch.
        width: Channels.
        depth: Blocks.
        batch: Images.
        embed: How patches become tokens.
        prefix: Tokens in front of the patches.
        suffix: Tokens behind them.
        positions: What is added in front of the blocks.
        inner: Positions that attention uses.
        attention: How attention is written.
        project: How queries, keys and values are made.
        block: Order in a block: "pre", "post" or "parallel".
        mlp: Kind of the MLPs.
        scale: Whether branches are scaled by channel.
        head: What is made of the tokens.
        body: How blocks are held and called: "list", "sequential", "named", "two parts", "called twice", "sequence first".
        images: What is done to images first: "", "each normalised" or "constants".
        early: Whether tokens from before the blocks are added once more behind the first.
        second: Whether another embedding of the image is added there.
        reversed_attention: Whether attention runs on reversed tokens.
        traps: Names with a place: "Mixer:between" blocks, or "Mixer:inside" the second one.
        pixel_block: Kind of the blocks of a grid.
        pixel_trap: What is wrong in the pixel operators of the last block; empty for nothing.
        layout: Layout of a grid between blocks: "BCHW", "BHWC", or of windows "BNC".
        down: How a grid becomes smaller: "convolution", "merging" or "pooling".
        proposal: Kind of the proposal.
        proposal_size: `proposal_size`; 0 for none.
        saliency: "psm", or "squares" for a function of the features.
        z: Keep ratio.
        then_z: A second keep ratio; 0 for none.
        mode: `mode`.
        background: `background`.
        restore: `restore`.
        narrow: `narrow`.
        fuse: `fuse`.
        merge: Tokens that are merged in each block; 0 for none.
        proportional: Whether attention counts merged tokens.
        other_size: Whether images of another size are tried too.
        verify: `verify`.
    """

    seed: int = 0
    trunk: str = "vit"
    grid: tuple[int, ...] = (3, 4)
    patch: tuple[int, int] = (4, 4)
    width: int = 8
    depth: int = 2
    batch: int = 2
    embed: str = "convolution"
    prefix: int = 1
    suffix: int = 0
    positions: str = "table"
    inner: str = "none"
    attention: str = "fused"
    project: str = "qkv"
    block: str = "pre"
    mlp: str = "gelu"
    scale: bool = False
    head: str = "class"
    body: str = "list"
    images: str = ""
    early: bool = False
    second: bool = False
    reversed_attention: bool = False
    traps: tuple[str, ...] = ()
    pixel_block: str = "convnext"
    pixel_trap: str = ""
    layout: str = "BCHW"
    down: str = "convolution"
    proposal: str = "features"
    proposal_size: int = 0
    saliency: str = "psm"
    z: float = 0.5
    then_z: float = 0.0
    mode: str = "auto"
    background: str = "auto"
    restore: str = "nearest"
    narrow: bool = True
    fuse: bool = True
    merge: int = 0
    proportional: bool = True
    other_size: bool = False
    verify: bool = True

    @property
    def on_tokens(self) -> bool:
        """Whether the blocks run on tokens."""
        return self.trunk in ("vit", "clip")

    @property
    def patches(self) -> int:
        """How many patches."""
        return prod(self.grid)

    @property
    def image(self) -> tuple[int, ...]:
        """Sizes of the images (H, W), or clips (T, H, W)."""
        *frames, rows, columns = self.grid
        return (*(2 * count for count in frames), rows * self.patch[0], columns * self.patch[1])

    def as_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Spec(), name)}

    def __str__(self) -> str:
        changed = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return f"Spec({', '.join(f'{name}={value!r}' for name, value in changed if value != getattr(Spec(), name))})"
