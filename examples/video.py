"""Prunes a VideoMAE on a clip. `python -m examples.video clip.mp4 --pretrained MCG-NJU/videomae-base-finetuned-kinetics`.

Without a file it takes a clip that scikit-image ships, and without `--pretrained` a VideoMAE-B with random weights: its times
are those of the trained model, its scores mean nothing. The clip is cut into views, whose scores are averaged. `--saliency
motion` keeps what moves, without a proposal; else the proposal sees each frame. docs/video.md explains it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

import papr_fx
from papr_fx.video import average_views, read_video, sample_views


def video_model(given: argparse.Namespace) -> Any:
    """A trained VideoMAE, or one with random weights: clips (B, T, 3, H, W) to logits (B, classes)."""
    if given.pretrained:
        return transformers.AutoModelForVideoClassification.from_pretrained(given.pretrained).eval()
    width = given.hidden_size
    config: Any = transformers.VideoMAEConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=given.num_layers,
        num_attention_heads=max(1, width // 64),
        image_size=given.img_size,
        num_frames=given.num_frames,
    )
    config.num_labels = 400
    return transformers.VideoMAEForVideoClassification(config).eval()


def views_of(given: argparse.Namespace, config: Any) -> Tensor:
    """The views of the clip (V, T, 3, H, W), normalised."""
    path = given.video
    if path is None:
        from skimage import data

        path = Path(data.__file__).parent / "no_time_for_that_tiny.gif"
    sizes = {"step": given.frame_step, "temporal": given.temporal_views, "spatial": given.spatial_views}
    views = sample_views(read_video(path), config.num_frames, size=config.image_size, **sizes)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (views - mean) / std


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median times of calls that take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found[1:]) for name, found in times.items()}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prints and returns the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("video", type=Path, nargs="?", help="default: a clip that scikit-image ships")
    options.add_argument("--pretrained", default="", metavar="NAME", help="a VideoMAE of the hub, or a folder")
    options.add_argument("--hidden-size", type=int, default=768, help="of random weights, as the next three")
    options.add_argument("--num-layers", type=int, default=12)
    options.add_argument("--num-frames", type=int, default=16)
    options.add_argument("--img-size", type=int, default=224)
    options.add_argument("--proposal", default="lite0", help="its weights are loaded; lite0's come with pip")
    options.add_argument("--saliency", default="psm", help="such as motion, which takes no proposal, or motion*psm")
    options.add_argument("--z", type=float, default=0.45, help="keep ratio")
    options.add_argument("--temporal-views", type=int, default=1)
    options.add_argument("--spatial-views", type=int, default=1)
    options.add_argument("--frame-step", type=int, default=1)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    model = video_model(given)
    views = views_of(given, model.config)
    proposal = None if given.saliency == "motion" else given.proposal
    gm = papr_fx.transform(model, proposal, given.z, saliency=given.saliency)
    times = milliseconds({"dense": lambda: model(views[:1]), "pruned": lambda: gm(views[:1])}, given.rounds)
    scores = {"dense": average_views(model, views), "pruned": average_views(gm, views)}
    counted = papr_fx.report(gm)
    print(f"{tuple(views.shape)} views; of one, {counted.dense_macs / 1e9:.1f} GMACs dense, ", end="")
    print(f"{counted.total_macs / 1e9:.1f} pruned to z={given.z:g}")
    for name, found in scores.items():
        classes = [f"{model.config.id2label[place]} {found[place]:.4f}" for place in found.topk(5).indices.tolist()]
        print(f"{name}: {times[name]:.0f} ms a view; {', '.join(classes)}")
    if not given.pretrained:
        print("random weights, so the scores mean nothing: name a trained model as --pretrained")
    return {**times, "scores": scores}


if __name__ == "__main__":
    main()
