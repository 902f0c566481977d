"""Finetunes a pruned timm classifier on a folder of images. `python -m examples.finetune DATA --pretrained --z 0.5`.

DATA holds `train/` and `val/`, each with a folder per class. The accuracy on `val/` is printed before, dense and pruned, and
after. Before, a head for classes that the weights do not know guesses. Parts of the model can stay as they are: `--freeze
patch_embed blocks.0 blocks.1`. The file that is written holds the weights under the model's own names, so timm loads it too
(`--checkpoint`, here and in examples/serve.py); `load` makes the pruned model of it again. docs/training.md explains it.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.models import load_checkpoint
from timm.utils import ParseKwargs, freeze
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import papr_fx
from papr_fx.evaluation.image_file import read_image

Batches = DataLoader[tuple[Tensor, Tensor]]


def loader(given: argparse.Namespace, split: str, config: dict[str, Any]) -> Batches:
    """Batches of images (B, 3, H, W) and classes (B,); those for training in random order, cropped and flipped at random."""
    training = split == "train"
    prepare: Any = create_transform(**config, is_training=training)
    folder = ImageFolder(given.data / split, prepare, loader=read_image, allow_empty=True)
    return DataLoader(folder, given.batch_size, shuffle=training, num_workers=given.workers)


@torch.no_grad()
def top1(model: nn.Module, batches: Batches, device: str) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = [model(images.to(device)).argmax(1).cpu() == labels for images, labels in batches]
    return 100 * torch.cat(right).double().mean().item()


def train(model: nn.Module, batches: Batches, given: argparse.Namespace) -> None:
    """Trains the parameters that are not frozen, in place. Those of the proposal are none."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=given.lr, weight_decay=given.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, given.epochs * len(batches))
    model.train()
    for epoch in range(given.epochs):
        for images, labels in tqdm(batches, desc=f"epoch {epoch + 1} of {given.epochs}", leave=False):
            optimiser.zero_grad()
            F.cross_entropy(model(images.to(given.device)), labels.to(given.device)).backward()
            optimiser.step()
            schedule.step()


def fitting(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights to load. A head for other classes is left as the model has it."""
    classifier: Any = cast(Any, model).pretrained_cfg["classifier"]  # a name, or several
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or ()))
    own = model.state_dict()
    other = {name for name in weights.keys() & own.keys() if name.startswith(heads) and weights[name].shape != own[name].shape}
    return {name: own[name] if name in other else given for name, given in weights.items()}


def load(path: Path) -> papr_fx.PrunedModule:
    """The finetuned model, pruned as it was trained. The file holds no code; the proposal is loaded by its name."""
    saved = torch.load(path, weights_only=True)
    model = timm.create_model(saved["arch"], **saved["model_kwargs"]).eval()
    model.load_state_dict(saved["state_dict"])
    return papr_fx.transform(model, saved["proposal"], saved["z"], verify=False)  # it was proved before the training


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the accuracies, and writes the weights."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--model", default="vit_small_patch16_224")
    options.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    options.add_argument("--pretrained", action="store_true")
    options.add_argument("--checkpoint", default="", help="local weights to start from")
    options.add_argument("--proposal", default="lite0", help="its weights are loaded; lite0's come with pip")
    options.add_argument("--z", type=float, default=0.5, help="keep ratio")
    options.add_argument("--freeze", nargs="*", default=[], metavar="MODULE", help="modules that are not trained")
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--batch-size", "-b", type=int, default=64)
    options.add_argument("--lr", type=float, default=1e-4)
    options.add_argument("--weight-decay", type=float, default=0.05)
    options.add_argument("--workers", "-j", type=int, default=4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path, default=Path("out/finetuned.pt"))
    given = options.parse_args(arguments)
    torch.manual_seed(given.seed)
    classes, others = (ImageFolder(given.data / split, allow_empty=True).classes for split in ("train", "val"))
    if classes != others:
        options.error(f"train/ has the classes {classes}, and val/ {others}: give both the same folders, empty or not")
    kwargs: dict[str, Any] = {"num_classes": len(classes), **given.model_kwargs}
    model = timm.create_model(given.model, pretrained=given.pretrained, **kwargs).eval().to(given.device)
    if given.checkpoint:
        load_checkpoint(model, given.checkpoint, filter_fn=fitting, weights_only=True)
    if given.freeze:
        freeze(model, given.freeze)
    config = resolve_data_config(given.model_kwargs, model=model)
    batches, held_out = loader(given, "train", config), loader(given, "val", config)
    gm = papr_fx.transform(model, given.proposal, given.z)
    found = {"dense, before": top1(model, held_out, given.device), "pruned, before": top1(gm, held_out, given.device)}
    train(gm, batches, given)
    found["pruned, after"] = top1(gm, held_out, given.device)
    for name, accuracy in found.items():
        print(f"{name}: {accuracy:.1f} % right")
    saved = {"arch": given.model, "model_kwargs": kwargs, "classes": classes, "proposal": given.proposal, "z": given.z}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**saved, "state_dict": gm.state_dict()}, given.output)
    print(f"weights: {given.output}")
    return found


if __name__ == "__main__":
    main()
