"""Trains a small ViT from scratch with and without pruning, on objects in clutter. `python -m examples.clutter`.

An image is a crop of a photograph (from scikit-image) with a handwritten digit (from scikit-learn) on a tile of two colours.
Beside it is a tile of the same kind whose strokes are scrambled. The class is the digit. A small ConvNet is trained first,
as the proposal. Then two ViTs start from the same weights; one is transformed before its first step. This takes minutes on
a laptop.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import trange

import papr_fx

SIDE, PATCH, TILE = 56, 8, 16
BATCH = 64
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


class Images(NamedTuple):
    """Images (N, 3, 56, 56) of whole numbers from 0 to 255, and their classes (N,)."""

    pixels: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all images once, normalised, with their classes."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield normalised(pixels), labels


def normalised(pixels: Tensor) -> Tensor:
    """Maps whole numbers from 0 to 255 to the range that the networks take."""
    return (pixels.float() - 127.5) / 64


def cluttered(count: int, *, test: bool) -> Images:
    """Draws images; training and test images share no digit."""
    from skimage import data
    from skimage.util import img_as_ubyte
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    chosen = np.flatnonzero((np.arange(len(digits.target)) % 5 == 0) == test)
    photographs = [img_as_ubyte(getattr(data, name)())[::2, ::2] for name in PHOTOGRAPHS]
    random = np.random.default_rng(int(test))
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(size - SIDE) for size in photograph.shape[:2])
        image = photograph[top : top + SIDE, left : left + SIDE].copy()
        digit, other = random.choice(chosen, 2)
        _place(image, random.permutation(digits.images[other].ravel()).reshape(8, 8), random)
        _place(image, digits.images[digit], random)
        pixels[i], labels[i] = image, digits.target[digit]
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def _place(image: Any, strokes: Any, random: np.random.Generator) -> None:
    """Draws strokes (8, 8), from 0 to 16, on a tile somewhere on the grid of patches."""
    ink = np.kron(strokes, np.ones((2, 2)))[..., None] / 16
    colours = [random.uniform(0, 90, 3), random.uniform(165, 255, 3)]
    random.shuffle(colours)
    top, left = PATCH * random.integers((SIDE - TILE) // PATCH + 1, size=2)
    image[top : top + TILE, left : left + TILE] = colours[0] * (1 - ink) + colours[1] * ink


class ConvNet(nn.Module):
    """The proposal: five convolutions, average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        shape = ((3, 16, 2), (16, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1))
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, stride in shape
        ]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, 10)."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


def small_vit() -> nn.Module:
    """A ViT of 7 x 7 patches and a class token."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, embed_dim=96, depth=6, num_heads=4, num_classes=10
    )


def train(model: nn.Module, images: Images, steps: int, *, rate: float, name: str = "") -> float:
    """Trains in place; returns seconds per step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(2, steps))
    random = torch.Generator().manual_seed(0)
    model.train()
    start = time.perf_counter()
    for _ in trange(steps, desc=name, leave=False):
        picked = torch.randint(len(images.labels), (BATCH,), generator=random)
        optimiser.zero_grad()
        F.cross_entropy(model(normalised(images.pixels[picked])), images.labels[picked]).backward()
        optimiser.step()
        schedule.step()
    return (time.perf_counter() - start) / max(1, steps)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = sum(int((model(pixels).argmax(1) == labels).sum()) for pixels, labels in images.batches(250))
    return 100 * right / len(images.labels)


def proposal_for(images: Images, steps: int) -> nn.Module:
    """A trained `ConvNet`."""
    torch.manual_seed(0)
    network = ConvNet()
    train(network, images, steps, rate=3e-3, name="ConvNet")
    return network.eval()


def main() -> None:
    """Prints the accuracy and the step time of both ViTs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--z", type=float, default=0.5, help="keep ratio")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=12000, help="images for training")
    arguments = parser.parse_args()
    images, held_out = cluttered(arguments.images, test=False), cluttered(max(1, arguments.images // 6), test=True)
    proposal = proposal_for(images, arguments.steps)
    print(f"proposal: {accuracy(proposal, held_out):.1f} % of held-out images right")
    rows: list[tuple[Any, ...]] = []
    for z in (1.0, arguments.z):
        torch.manual_seed(1)
        model = small_vit().train()
        trained = papr_fx.transform(model, proposal, z) if z < 1 else model
        seconds = train(trained, images, arguments.steps, rate=2.5e-3, name=f"ViT, z={z:g}")
        rows.append((z, 1e3 * seconds, rows[0][1] / 1e3 / seconds if rows else 1.0, accuracy(trained, held_out)))
    headers = ["z in training and test", "ms per step", "speed-up", "top-1, %"]
    print(tabulate(rows, headers=headers, floatfmt=("g", ".0f", ".2f", ".1f"), tablefmt="github"))


if __name__ == "__main__":
    main()
