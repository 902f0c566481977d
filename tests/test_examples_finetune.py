"""The finetuning of examples/finetune.py: the accuracy goes up, and what it writes is the model that it trained."""

import argparse

import pytest
import timm
import torch
from PIL import Image

import papr_fx
from examples import finetune

SMALL = {"depth": 1, "img_size": 64, "embed_dim": 48, "num_classes": 2}


def write_images(root, per_class):
    """Noise around two colours."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name, colour in (("cold", (60, 90, 190)), ("warm", (190, 90, 60))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.tensor(colour) + 60 * torch.randn(64, 64, 3, generator=generator)
                Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / f"{i}.png")


def test_finetuning(tmp_path, capsys, monkeypatch):
    write_images(tmp_path, 16)
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "proposal")
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    torch.nn.init.trunc_normal_(model.head.weight, std=0.2)
    with torch.no_grad():
        model.head.bias[0] += 5  # all images are warm, so half of the answers are right
    torch.save(model.state_dict(), tmp_path / "start.pt")
    arguments = [tmp_path, "--model", "vit_tiny_patch16_224", "--checkpoint", tmp_path / "start.pt", "--device", "cpu"]
    arguments += ["--proposal", f"local-dir:{tmp_path / 'proposal'}", "--epochs", 6, "--batch-size", 8, "--lr", 3e-3]
    arguments += ["--workers", 0, "--z", 0.3, "--freeze", "patch_embed", "--output", tmp_path / "tuned.pt"]
    kwargs = [f"{key}={value}" for key, value in SMALL.items() if key != "num_classes"]
    kept = []
    train = finetune.train
    monkeypatch.setattr(finetune, "train", lambda gm, *given: kept.append(gm) or train(gm, *given))
    found = finetune.main([*map(str, arguments), "--model-kwargs", *kwargs])
    assert found["dense, before"] == found["pruned, before"] == 50
    assert found["pruned, after"] >= 90
    assert "pruned, after: " in capsys.readouterr().out

    saved = torch.load(tmp_path / "tuned.pt", weights_only=True)
    assert saved["classes"] == ["cold", "warm"]
    assert torch.equal(saved["state_dict"]["patch_embed.proj.weight"], model.patch_embed.proj.weight)
    assert not torch.equal(saved["state_dict"]["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight)
    (trained,), loaded = kept, finetune.load(tmp_path / "tuned.pt")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), trained(images))
        papr_fx.set_keep_ratio(loaded, 1.0)
        assert not torch.equal(loaded(images), trained(images))
        dense = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "tuned.pt"), **SMALL).eval()
        assert torch.equal(loaded(images), dense(images))


@pytest.mark.parametrize("classes", [2, 5])
def test_weights_whose_head_has_other_classes(tmp_path, classes):
    """The head alone is left as it was."""
    model, other = (timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": n}) for n in (2, classes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(other.state_dict(), tmp_path / "other.pt")
    timm.models.load_checkpoint(model, tmp_path / "other.pt", filter_fn=finetune.fitting)
    for name, value in model.state_dict().items():
        kept = name.startswith("head.") and classes == 5
        assert torch.equal(value, before[name] if kept else other.state_dict()[name])
    torch.save({**other.state_dict(), "pos_embed": torch.zeros(1, 2, 48)}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        timm.models.load_checkpoint(model, tmp_path / "other.pt", filter_fn=finetune.fitting)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    given = argparse.Namespace(data=tmp_path, batch_size=2, workers=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)
    pixels[:32] = 255
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / split / "a" / "turned.png", exif=exif)
    ((images, _),) = finetune.loader(given, "val", {"input_size": (3, 64, 64), "crop_pct": 1.0})
    assert images[0, :, :, 40:].amin() > images[0, :, :, :24].amax()  # the bright half is at the right


def test_classes_of_both_folders_are_the_same(tmp_path, capsys):
    """Else each folder would number its own."""
    write_images(tmp_path, 1)
    (tmp_path / "train" / "hot").mkdir()
    with pytest.raises(SystemExit):
        finetune.main([str(tmp_path), "--device", "cpu"])
    assert "train/ has the classes ['cold', 'hot', 'warm'], and val/ ['cold', 'warm']" in capsys.readouterr().err
