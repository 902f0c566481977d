"""What pruning costs a ViT with trained weights, by map and background. `python -m benchmarks.trained_vit WEIGHTS FOLDER`.

WEIGHTS is the ONNX file that `benchmarks.saliency_vit` tells of. FOLDER holds photographs of 224 pixels, `train/<class>/*` and
`val/<class>/*`. A k-NN and a linear probe are fitted on features of the dense model, and asked about those of the pruned one.
Cosines are between pruned and dense class tokens. The same network with its decoder is pruned as a dense model: correlation and
IoU (at 0.5) of its saliency maps with those of the dense model. Proposal: EfficientNet-Lite0 with its ImageNet weights; beside
it a random map, and one that keeps the centre; others by `--maps`. Differences between backgrounds are paired over images;
+- is a standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import papr_fx
from papr_fx.evaluation.image_file import read_image
from papr_fx.proposals.named import LITE0_STATISTICS, lite0
from papr_fx.tracing.macs import count_module_macs

from .record import environment, write
from .saliency_vit import Saliency, backbone, read_weights
from .trained_maps import Detail, PsmAndDetail, centre, off_centre
from .trained_plot import draw

STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BACKGROUNDS = ("drop", "coarse")
NETWORKS: dict[str, Callable[[], nn.Module]] = {"detail": Detail, "psm+detail": PsmAndDetail}
MAPS = ("psm", "random", "centre", "expected-cam", "cam", *NETWORKS)
_BATCH = 10


@dataclass(frozen=True)
class Photographs:
    """Images (n, 3, 224, 224), normalised, and their classes (n,)."""

    images: Tensor
    classes: Tensor

    @classmethod
    def of(cls, folder: Path, most: int | None = None) -> Photographs:
        """Those of a folder with a folder for each class; at most as many, spread over all of them."""
        names = sorted(path.name for path in folder.iterdir())
        files = sorted(folder.glob("*/*"), key=lambda file: (file.name, file.parent.name))
        files = files[:: max(1, len(files) // most)][:most] if most else files
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in STATISTICS)
        pixels = [torch.frombuffer(bytearray(read_image(file).tobytes()), dtype=torch.uint8) for file in files]
        images = torch.stack([(p.view(224, 224, 3).permute(2, 0, 1).float() / 255 - mean) / std for p in pixels])
        return cls(images, torch.tensor([names.index(file.parent.name) for file in files]))


@torch.inference_mode()
def outputs(function: Callable[[Tensor], Tensor], images: Tensor, title: str) -> Tensor:
    """The outputs of a function for images, batch by batch."""
    return torch.cat([function(batch) for batch in tqdm(images.split(_BATCH), desc=title, leave=False)])


def knn(train: Tensor, classes: Tensor, test: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classes (n,) by a vote of the k nearest training features, weighted by exp(cosine / temperature) (Caron et al., 2021)."""
    value, index = (F.normalize(test) @ F.normalize(train).T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(classes.max()) + 1)
    return votes.scatter_add_(1, classes[index], (value / temperature).exp()).argmax(1)


def probe(train: Tensor, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear classifier that is fitted on features: it gives classes (n,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted: Any = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    fitted.fit(train.numpy(), classes.numpy())
    return lambda features: torch.from_numpy(fitted.predict(features.numpy()))


def correlation(maps: Tensor, dense: Tensor) -> Tensor:
    """Pearson's correlation of maps (n, 1, H, W) with others, (n,)."""
    a, b = (value.flatten(1) - value.flatten(1).mean(1, keepdim=True) for value in (maps, dense))
    return F.cosine_similarity(a, b, dim=1)


def overlap(maps: Tensor, dense: Tensor) -> Tensor:
    """Intersection over union of maps (n, 1, H, W) above 0.5, (n,); 1 where both are empty."""
    a, b = maps.flatten(1) > 0.5, dense.flatten(1) > 0.5
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


def with_error(values: Tensor, scale: float = 1.0) -> tuple[float, float]:
    """Mean of values (n,), and its standard error."""
    values = values.double() * scale
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@dataclass(frozen=True)
class Judges:
    """What tells how good features and maps are, fitted on the dense model.

    Attributes:
        truth: Classes of the test images.
        features: The dense model's class tokens of them.
        classify: Classifiers by name: features to classes.
        maps: The dense model's saliency maps of the first test images.
    """

    truth: Tensor
    features: Tensor
    classify: dict[str, Callable[[Tensor], Tensor]]
    maps: Tensor

    def scores(self, features: Tensor, maps: Tensor) -> dict[str, Tensor]:
        """Values for each image: right or wrong, cosine, correlation, IoU."""
        right = {name: (classify(features) == self.truth).float() for name, classify in self.classify.items()}
        cosine = F.cosine_similarity(features, self.features)
        return {**right, "cosine": cosine, "correlation": correlation(maps, self.maps), "IoU": overlap(maps, self.maps)}


def pruned(model: nn.Module, saliency: str, background: str, example: Tensor) -> papr_fx.PrunedModule:
    """The model pruned by Lite0's map, a random one, the centre, or a map of a network of its own."""
    given: Any = {"centre": centre, **dict.fromkeys(NETWORKS, "psm")}.get(saliency, saliency)
    proposal = NETWORKS[saliency]() if saliency in NETWORKS else lite0()
    stats = (STATISTICS, LITE0_STATISTICS)
    options: dict[str, Any] = {"saliency": given, "background": background, "input_stats": stats, "verify": False}
    return papr_fx.transform(model, proposal, 0.5, example_input=example, **options)


def measure(
    models: tuple[nn.Module, nn.Module], judges: Judges, test: Photographs, maps: list[str], ratios: list[float]
) -> Iterator[dict[str, Any]]:
    """Rows: one for each map, background and keep ratio."""
    shown = test.images[: len(judges.maps)]
    for name in maps:
        gms = {b: [pruned(model, name, b, test.images[:1]) for model in models] for b in BACKGROUNDS}
        for z in ratios:
            drop: dict[str, Tensor] = {}
            for background, (classifier, dense_model) in gms.items():
                for gm in (classifier, dense_model):
                    papr_fx.set_keep_ratio(gm, z)
                title = f"{name} {background} {z:g}"
                found = judges.scores(outputs(classifier, test.images, title), outputs(dense_model, shown, title))
                row: dict[str, Any] = {"map": name, "z": z, "background": background}
                counted = papr_fx.report(classifier)
                row |= {"tokens": counted.sites[0].kept, "GMACs": counted.total_macs / 1e9}
                for key, values in found.items():
                    row[key], row[f"{key} +-"] = with_error(values, 100 if key in judges.classify else 1)
                    if drop:
                        difference = with_error(values - drop[key], 100 if key in judges.classify else 1)
                        row[f"{key} - drop"], row[f"{key} - drop +-"] = difference
                drop = drop or found
                yield row


def dense_row(model: nn.Module, judges: Judges, image: Tensor) -> dict[str, Any]:
    """The row of the dense classifier, whose GMACs are those of an image (1, 3, H, W)."""
    row: dict[str, Any] = {"map": "dense", "background": "dense", "GMACs": count_module_macs(model, image) / 1e9}
    scores = judges.scores(judges.features, judges.maps)
    for key in judges.classify:
        row[key], row[f"{key} +-"] = with_error(scores[key], 100)
    return row


def table(rows: list[dict[str, Any]], judges: Judges) -> str:
    """The rows with their standard errors, and paired differences."""
    cells: list[dict[str, str]] = []
    for row in rows:
        cell = {key: str(row[key]) for key in ("map", "z", "tokens", "background")}
        cell["GMACs"] = f"{row['GMACs']:.2f}"
        for key in (*judges.classify, "cosine", "correlation", "IoU"):
            digits = 1 if key in judges.classify else 3
            cell[key] = f"{row[key]:.{digits}f} +- {row[f'{key} +-']:.{digits}f}"
        for key in judges.classify:
            name = f"{key} - drop"
            cell[name] = f"{row[name]:+.1f} +- {row[f'{name} +-']:.1f}" if name in row else ""
        cells.append(cell)
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)


def judges_of(models: tuple[nn.Module, nn.Module], train: Photographs, test: Photographs, maps: int) -> Judges:
    """Judges that are fitted on the dense model's features."""
    features = outputs(models[0], train.images, "training images")

    def nearest(tokens: Tensor) -> Tensor:
        return knn(features, train.classes, tokens)

    classify = {"k-NN": nearest, "probe": probe(features, train.classes)}
    dense = outputs(models[0], test.images, "test images")
    return Judges(test.classes, dense, classify, outputs(models[1], test.images[:maps], "saliency"))


def main() -> None:
    """Prints the table, and writes out/trained_vit.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="ONNX file")
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS[:3]))
    parser.add_argument("--z", nargs="+", type=float, default=[0.5, 0.3, 0.2])
    parser.add_argument("--off-centre", action="store_true", help="move the subjects of all photographs towards the corners")
    parser.add_argument("--images", type=int, help="at most as many test images")
    parser.add_argument("--saliency-images", type=int, default=40, help="test images whose saliency maps are compared")
    parser.add_argument("--plot", type=Path, help="a PNG file for the probe's accuracy against GMACs")
    parser.add_argument("--out", type=Path, default=Path("out/trained_vit.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, test = Photographs.of(arguments.folder / "train"), Photographs.of(arguments.folder / "val", arguments.images)
    if arguments.off_centre:
        train, test = (replace(found, images=off_centre(found.images)) for found in (train, test))
    weights = read_weights(arguments.weights)
    models = backbone(weights[0]), Saliency(weights)
    judges = judges_of(models, train, test, arguments.saliency_images)
    dense = dense_row(models[0], judges, test.images[:1])
    print(f"{len(test.images)} images; {environment(0)}")
    print("dense: " + ", ".join(f"{key} {dense[key]:.1f} +- {dense[f'{key} +-']:.1f}" for key in judges.classify) + "\n")
    rows = list(measure(models, judges, test, arguments.maps, arguments.z))
    print(table(rows, judges))
    write(arguments.out, [dense, *rows], seed=0)
    if arguments.plot:
        draw(arguments.plot, [dense, *rows])


if __name__ == "__main__":
    main()
