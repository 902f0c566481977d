"""Prunes the body of a detector of torchvision, on a photograph. `python -m examples.detect --body convnext_tiny --z 0.65`.

The detector is a Faster R-CNN, a Mask R-CNN or a RetinaNet on a ConvNeXt or Swin of torchvision. Only `detector.backbone.body`
is transformed: pyramid and heads read all positions, and a detector takes lists of images. Weights are random, so boxes mean
nothing; `--pretrained` loads the body's, of ImageNet, and `--checkpoint` those of a whole detector that you trained, whose
boxes are real. Times, and how far feature maps and boxes move, are printed. docs/dense.md explains it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.functional import to_tensor

import papr_fx

# Each with the option that sets the least score of a box.
DETECTORS: dict[str, tuple[Any, str]] = {
    "fasterrcnn": (FasterRCNN, "box_score_thresh"),
    "maskrcnn": (MaskRCNN, "box_score_thresh"),
    "retinanet": (RetinaNet, "score_thresh"),
}


class Body(nn.Module):
    """The four stages of a ConvNeXt or Swin of torchvision: maps (B, C, h, w) by name."""

    def __init__(self, name: str, *, pretrained: bool) -> None:
        super().__init__()
        classifier: Any = get_model(name, weights="DEFAULT" if pretrained else None)
        self.stages: nn.Module = classifier.features
        self.channels_last = "swin" in name

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to maps of 1/4 to 1/32 of the sides."""
        maps: dict[str, Tensor] = {}
        x = images
        for place, part in enumerate(self.stages.children()):
            x = part(x)
            if place % 2:  # the others reduce the sides
                maps[str(place // 2)] = x.permute(0, 3, 1, 2) if self.channels_last else x
        return maps


class Backbone(nn.Module):
    """A body and its feature pyramid, as detectors take it."""

    def __init__(self, body: nn.Module, *, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        widths = [found.shape[1] for found in body.eval()(torch.zeros(1, 3, 64, 64)).values()]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to the maps of the pyramid."""
        return self.fpn(self.body(images))


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median times of calls that take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found[1:]) for name, found in times.items()}


def matched(dense: dict[str, Tensor], pruned: dict[str, Tensor]) -> float:
    """The share of the dense model's boxes that a pruned one of the same label overlaps by half (intersection over union)."""
    over = box_iou(dense["boxes"], pruned["boxes"]) * (dense["labels"][:, None] == pruned["labels"])  # (dense, pruned)
    return (over >= 0.5).any(1).double().mean().item() if over.numel() else float(len(dense["boxes"]) == 0)


def photograph(path: Path | None) -> Tensor:
    """An image (3, H, W) in 0..1: a file, or an astronaut that scikit-image ships."""
    if path is None:
        from skimage import data

        return to_tensor(data.astronaut())
    return to_tensor(Image.open(path).convert("RGB"))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--detector", default="fasterrcnn", choices=DETECTORS)
    options.add_argument("--body", default="convnext_tiny", help="convnext_* or swin_* of torchvision")
    options.add_argument("--pretrained", action="store_true", help="the body's weights of ImageNet")
    options.add_argument("--checkpoint", default="", help="the state dictionary of a whole detector")
    options.add_argument("--num-classes", type=int, default=91)
    options.add_argument("--proposal", default="lite0", help="its weights are loaded; lite0's come with pip")
    options.add_argument("--proposal-size", type=int, help="the shorter side for the proposal; default: the body's")
    options.add_argument("--z", type=float, default=0.65, help="keep ratio")
    options.add_argument("--background", default="auto", choices=("auto", "keep", "zero"), help="of dropped positions")
    options.add_argument("--image", type=Path, help="default: a photograph that scikit-image ships")
    options.add_argument("--img-size", type=int, default=512, help="the shorter side, as the detector resizes it")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    body = Body(given.body, pretrained=given.pretrained)
    kind, least = DETECTORS[given.detector]
    all_boxes: dict[str, Any] = {} if given.checkpoint else {least: 0.0}  # random heads are sure of nothing
    detector: Any = kind(Backbone(body), given.num_classes, min_size=given.img_size, max_size=2 * given.img_size, **all_boxes)
    if given.checkpoint:
        detector.load_state_dict(torch.load(given.checkpoint, weights_only=True))
    detector.eval()
    image = photograph(given.image)
    resized: Tensor = detector.transform([image])[0].tensors  # as the body gets it: (1, 3, H, W)
    gm = papr_fx.transform(
        body, given.proposal, given.z, example_input=resized, background=given.background, proposal_size=given.proposal_size
    )

    def detect(module: nn.Module) -> dict[str, Tensor]:
        detector.backbone.body = module  # all that there is to do
        return detector([image])[0]

    runs = {"body, dense": lambda: body(resized), "body, pruned": lambda: gm(resized)}
    runs |= {"detector, dense": lambda: detect(body), "detector, pruned": lambda: detect(gm)}
    found = milliseconds(runs, given.rounds)
    counted = papr_fx.report(gm)
    macs = f"{counted.dense_macs / 1e9:.1f} GMACs dense, {counted.total_macs / 1e9:.1f} with the proposal"
    print(f"{given.body} at {tuple(resized.shape[-2:])}, z={given.z:g}: {macs}")
    print("".join(f"{name}: {ms:.0f} ms\n" for name, ms in found.items()), end="")
    maps, pruned = body(resized), gm(resized)
    for name, value in maps.items():
        found[f"stage {name}"] = F.cosine_similarity(value, pruned[name]).mean().item()
        print(f"stage {name}, {tuple(value.shape[1:])}: mean cosine of dense and pruned features {found[f'stage {name}']:.3f}")
    boxes, others = detect(body), detect(gm)
    found["boxes"] = matched(boxes, others)
    print(f"boxes: {len(boxes['boxes'])} dense, {len(others['boxes'])} pruned; {100 * found['boxes']:.0f} % are found again")
    if not given.checkpoint:
        print("the heads are random, so boxes mean nothing: give a trained detector's weights as --checkpoint")
    return found


if __name__ == "__main__":
    main()
