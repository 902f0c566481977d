"""Coloured images in class folders, networks that tell them apart, and options of the command line for both."""

import json

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from .models import enliven

MODEL = ["--model", "test_vit", "--num-classes", "7", "--proposal", "test_resnet"]


def coloured(seed):
    colours = torch.randint(256, (4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(colours.numpy()).resize((70, 60), Image.Resampling.NEAREST)


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    coloured(seed).save(path)


def write_checkpoints(root):
    """A ViT that puts each class first for some images, and a proposal."""
    torch.manual_seed(0)
    vit = enliven(timm.create_model("test_vit", num_classes=7)).eval()
    preprocess = create_transform(**resolve_data_config({}, model=vit), is_training=False)
    with torch.no_grad():
        vit.head.bias -= vit(torch.stack([preprocess(coloured(i)) for i in range(41)])).mean(0)
    torch.save(vit.state_dict(), root / "model.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), root / "proposal.pth")


def networks(root):
    model = timm.create_model("test_vit", num_classes=7, checkpoint_path=str(root / "model.pth")).eval()
    return model, timm.create_model("test_resnet", checkpoint_path=str(root / "proposal.pth")).eval()


def weights(folder):
    return [*MODEL, "--checkpoint", folder / "model.pth", "--proposal-checkpoint", folder / "proposal.pth"]


def options(folder, results, *more, random=False):
    given = ["eval", folder, *weights(folder), "--z", "1.0,0.5,0.3", "--workers", 0, "--batch-size", 4]
    given += [] if random else ["--no-random"]
    return [str(part) for part in [*given, "--results-file", results, *more]]


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def counted(path):
    keys = ("z", "top1", "top5", "agreement", "gmacs", "count", "unreadable")
    return [{key: row[key] for key in keys} | compared(row) for row in rows_of(path)]


def compared(row):
    """What a row says of a random map."""
    keys = ("random_top1", "random_agreement", "map_gain", "map_gain_error", "verdict")
    return {key: row[key] for key in keys if key in row}
