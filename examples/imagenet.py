"""Trains a timm model on a folder of images, dense or pruned, with timm's pipeline and DeiT's recipe by default.

    torchrun --nproc-per-node 8 -m examples.imagenet /data/imagenet --model deit_small_patch16_224 --z 0.5

The folder holds `train/` and `validation/` (or `val/`), each with a folder per class. Global batch 1024, AdamW at 1e-3 for 300
epochs with cosine decay, RandAugment, Mixup and CutMix, label smoothing, an average of weights. With `--finetune` the model
starts from its pretrained weights, for 30 epochs at 1e-5. One process trains on one device; on a CPU too.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import papr_fx


def loader(given: argparse.Namespace, split: str, config: dict[str, Any], device: torch.device) -> Iterable[Any]:
    """Batches of images (B, 3, H, W) and classes (B,); for training augmented, and divided between processes."""
    training = split == "train"
    dataset: Any = create_dataset("", root=str(given.data), split=split, is_training=training)
    return cast(
        "Iterable[Any]",
        create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=given.batch_size,
            is_training=training,
            use_prefetcher=False,
            mean=config["mean"],
            std=config["std"],
            interpolation="bicubic",
            crop_pct=config["crop_pct"],
            auto_augment="rand-m9-inc1" if training else None,  # a random magnitude may ask Pillow for images of 0 bits
            re_prob=0.25 if training else 0.0,
            num_workers=given.workers,
            distributed=training and torch.distributed.is_initialized(),
            device=device,
        ),
    )


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = total = 0
    for images, labels in batches:
        right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    return 100 * right / max(1, total)


def parser() -> argparse.ArgumentParser:
    """The options, named as in timm's train.py."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument(
        "--proposal", default="mobileone_s0", help="its pretrained weights are loaded, unless a checkpoint is named"
    )
    options.add_argument("--proposal-checkpoint", default="")
    options.add_argument("--z", type=float, default=0.5, help="keep ratio; 1 trains the dense model")
    options.add_argument("--finetune", action="store_true")
    options.add_argument("--epochs", type=int)
    options.add_argument("--batch-size", "-b", type=int, default=128, help="images per process")
    options.add_argument("--lr", type=float, help="at a global batch of 1024")
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--num-classes", type=int, default=1000)
    options.add_argument("--torchcompile", action="store_true")
    options.add_argument("--output", type=Path, default=Path("out/imagenet"))
    return options


def main(argv: list[str] | None = None) -> None:
    """Trains, and writes the model's weights, their moving average (both as the dense model names them), and summary.json."""
    given = parser().parse_args(argv)
    device: torch.device = init_distributed_device(argparse.Namespace(device="cuda" if torch.cuda.is_available() else "cpu"))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    first = world == 1 or torch.distributed.get_rank() == 0
    epochs = given.epochs or (30 if given.finetune else 300)
    rate = (given.lr or (1e-5 if given.finetune else 1e-3)) * given.batch_size * world / 1024
    torch.manual_seed(0)
    model = timm.create_model(given.model, pretrained=given.finetune, num_classes=given.num_classes, drop_path_rate=0.1).to(
        device
    )
    config = resolve_model_data_config(model)
    checkpoint = given.proposal_checkpoint
    proposal = timm.create_model(given.proposal, pretrained=not checkpoint, checkpoint_path=checkpoint)
    trained = papr_fx.transform(model.train(), proposal, given.z)
    average = ModelEmaV3(trained, decay=0.9998, use_warmup=True)
    parallel: nn.Module = DistributedDataParallel(trained) if world > 1 else trained
    run: Any = torch.compile(parallel) if given.torchcompile else parallel
    optimiser = create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=0.05)
    schedule, epochs = create_scheduler_v2(optimiser, num_epochs=epochs, warmup_epochs=0 if given.finetune else 5, min_lr=1e-6)
    mixup: Any = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=given.num_classes)
    loss_of = SoftTargetCrossEntropy()
    batches = loader(given, "train", config, device)
    held_out = loader(given, "validation", config, device)
    given.output.mkdir(parents=True, exist_ok=True)
    summary: list[dict[str, float]] = []
    step = 0
    for epoch in range(epochs):
        parallel.train()
        if hasattr(getattr(batches, "sampler", None), "set_epoch"):
            cast(Any, batches).sampler.set_epoch(epoch)
        for images, labels in batches:
            images, targets = mixup(images.to(device), labels.to(device))
            optimiser.zero_grad()
            loss_of(run(images), targets).backward()
            optimiser.step()
            step += 1
            average.update(trained, step=step)
        cast(Any, schedule).step(epoch + 1)
        if first:
            found = {
                "epoch": epoch,
                "top1": top1(trained, held_out, device),
                "top1_ema": top1(average.module, held_out, device),
            }
            summary.append(found)
            print(found, flush=True)
            torch.save(model.state_dict(), given.output / "last.pth")
            torch.save(average.module.state_dict(), given.output / "ema.pth")
            (given.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
