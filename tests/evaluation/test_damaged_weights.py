"""Weights and folders of models that are damaged, or made to do harm: refused by name, without running code in them."""

import json
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import transformers

import papr_fx
from papr_fx.evaluation import models

from .pictures import Evil

STATISTICS = ((0.5,) * 3, (0.5,) * 3)


def zipped(path, size):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))


def test_archives_that_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_SMALL", 1000)
    zipped(tmp_path / "a.pth", 10**6)
    with pytest.raises(papr_fx.ArgumentError, match=r"a\.pth has \d+ bytes and unpacks to 1000000: no weights do"):
        models.image_model("test_vit", pretrained=False, checkpoint=str(tmp_path / "a.pth"))
    zipped(tmp_path / "a.pth", 900)
    with pytest.raises(papr_fx.ArgumentError, match=r"could not be loaded from .*a\.pth: "):
        models.image_model("test_vit", pretrained=False, checkpoint=str(tmp_path / "a.pth"))
    zipped(tmp_path / "pytorch_model.bin", 10**6)
    (tmp_path / "config.json").write_text('{"model_type": "videomae", "architecture": "test_resnet"}')
    for load in (
        lambda: models.image_model(f"local-dir:{tmp_path}", pretrained=True),
        lambda: models.proposal_for(STATISTICS, f"local-dir:{tmp_path}", pretrained=True),
        lambda: models.video_model(str(tmp_path), pretrained=False),
    ):
        with pytest.raises(papr_fx.ArgumentError, match="unpacks to 1000000"):
            load()


def test_files_that_hold_something_else_are_named_shortly(tmp_path):
    checkpoint = str(tmp_path / "a.pth")
    torch.save(timm.create_model("test_vit"), checkpoint)
    with pytest.raises(papr_fx.ArgumentError, match=r"a\.pth: it holds more than tensors \((timm|torch).*\), .* state_dict"):
        models.image_model("test_vit", pretrained=False, checkpoint=checkpoint)
    torch.save(timm.create_model("test_resnet").state_dict(), checkpoint)
    with pytest.raises(papr_fx.ArgumentError, match=r"(?s)a\.pth: RuntimeError Error.*Missing key.* \.\.\.$") as refusal:
        models.image_model("test_vit", pretrained=False, checkpoint=checkpoint)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"\xff" * 8 + content[8:], lambda _: b""])
def test_a_folder_of_timm_with_damaged_weights(damage, tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    models.proposal_for(STATISTICS, f"local-dir:{tmp_path}", pretrained=True)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(papr_fx.ProposalError, match="the weights of 'local-dir:.*' could not be loaded: SafetensorError"):
        models.proposal_for(STATISTICS, f"local-dir:{tmp_path}", pretrained=True)


@pytest.fixture(scope="module")
def saved_video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, num_labels=3, **sizes)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(folder)
    transformers.VideoMAEImageProcessor().save_pretrained(folder)
    return folder


OWN = {"AutoConfig": "m.Config", "AutoModelForVideoClassification": "m.Model", "AutoImageProcessor": "m.Config"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"null"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"a": "\xff"}'),
        ("config.json", json.dumps({"model_type": "unheard_of", "auto_map": OWN}).encode()),
        ("model.safetensors", b"\xff" * 20),
        ("preprocessor_config.json", b"[" * 100_000),
        ("preprocessor_config.json", b'{"image_processor_type": "VideoMAEImageProcessor", "image_mean": ["a"]}'),
        ("preprocessor_config.json", b'{"image_processor_type": "VideoMAEImageProcessor", "image_mean": 3}'),
    ],
)
def test_a_damaged_folder_of_transformers(file, content, saved_video_model, tmp_path, monkeypatch):
    """Code of its own is not run, and nobody is asked whether it should be."""
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((saved_video_model / name).read_bytes())
    (tmp_path / "m.py").write_text("from pathlib import Path\nPath('mark').touch()\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("the terminal was asked"))
    assert models.video_model(str(tmp_path), pretrained=False).statistics
    (tmp_path / file).write_bytes(content)
    with pytest.raises(papr_fx.ArgumentError, match="could not be loaded|does not say how pixels are normalised"):
        models.video_model(str(tmp_path), pretrained=False)
    assert not Path("mark").exists()


def test_checkpoints_run_no_code(tmp_path):
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"a": Evil(tmp_path / "mark")}, tmp_path / "a.pth", **options)
        with pytest.raises(papr_fx.ArgumentError, match="whose code is not run|weights_only"):
            models.image_model("test_vit", pretrained=False, checkpoint=str(tmp_path / "a.pth"))
    assert not (tmp_path / "mark").exists()
