"""Files of weights, and folders of models: a small whole one of each, and the call that reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from papr_fx.evaluation.models import image_model, proposal_for, video_model

from .read_file import READ, Kind

STATISTICS = ((0.5,) * 3, (0.5,) * 3)
SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
# The arrays of such a ViT in a checkpoint of Flax.
_FLAX = {
    **{"embedding/kernel": (16, 16, 3, 16), "embedding/bias": (16,), "cls": (1, 1, 16)},
    **{"Transformer/posembed_input/pos_embedding": (1, 5, 16), "head/kernel": (16, 3), "head/bias": (3,)},
    **{f"Transformer/encoder_norm/{name}": (16,) for name in ("scale", "bias")},
}
_FLAX_BLOCK = {
    **{f"LayerNorm_{number}/{name}": (16,) for number in (0, 2) for name in ("scale", "bias")},
    **{f"MultiHeadDotProductAttention_1/{part}/kernel": (16, 2, 8) for part in ("query", "key", "value")},
    **{f"MultiHeadDotProductAttention_1/{part}/bias": (2, 8) for part in ("query", "key", "value")},
    **{"MultiHeadDotProductAttention_1/out/kernel": (2, 8, 16), "MultiHeadDotProductAttention_1/out/bias": (16,)},
    **{"MlpBlock_3/Dense_0/kernel": (16, 48), "MlpBlock_3/Dense_0/bias": (48,)},
    **{"MlpBlock_3/Dense_1/kernel": (48, 16), "MlpBlock_3/Dense_1/bias": (16,)},
}


def small_vit() -> torch.nn.Module:
    """The ViT whose weights are read."""
    return timm.create_model("test_vit", **SMALL)


def weights() -> list[Kind]:
    """Checkpoints, and folders that timm and transformers saved."""

    def checkpoint(name: str, file: str, save: Callable[[dict[str, Tensor], Path], object]) -> Kind:
        def write(folder: Path) -> None:
            save(small_vit().state_dict(), folder / file)

        def read(folder: Path) -> str:
            image_model("test_vit", pretrained=False, checkpoint=str(folder / file), **SMALL)
            return READ

        return Kind(f"checkpoint: {name}", file, write, read)

    return [
        checkpoint("pth", "a.pth", torch.save),
        checkpoint("pth before torch 1.6", "a.pth", lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False)),
        checkpoint("safetensors", "a.safetensors", save_file),
        checkpoint("npz", "a.npz", lambda state, path: _save_flax(path)),
        *(_timm_folder(file) for file in ("config.json", "model.safetensors")),
        *(_video_folder(file) for file in ("config.json", "preprocessor_config.json", "model.safetensors")),
    ]


def _timm_folder(file: str) -> Kind:
    """A folder that timm saved, read as model and as proposal."""

    def write(folder: Path) -> None:
        cast(Any, timm.models).save_for_hf(timm.create_model("test_resnet", num_classes=3), folder, safe_serialization=True)

    def read(folder: Path) -> str:
        proposal_for(STATISTICS, f"local-dir:{folder}", pretrained=True)
        image_model(f"local-dir:{folder}", pretrained=True)
        return READ

    return Kind(f"timm's folder: {file}", file, write, read)


def _video_folder(file: str) -> Kind:
    def write(folder: Path) -> None:
        import transformers

        library = cast(Any, transformers)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = library.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, num_labels=3, **sizes)
        library.VideoMAEForVideoClassification(config).save_pretrained(folder)
        library.VideoMAEImageProcessor(image_mean=STATISTICS[0], image_std=STATISTICS[1]).save_pretrained(folder)

    def read(folder: Path) -> str:
        video_model(str(folder), pretrained=False)
        return READ

    return Kind(f"transformers' folder: {file}", file, write, read)


def _save_flax(path: Path) -> None:
    shapes = _FLAX | {f"Transformer/encoderblock_0/{name}": shape for name, shape in _FLAX_BLOCK.items()}
    np.savez(path, allow_pickle=False, **{name: np.full(shape, 0.1, dtype=np.float32) for name, shape in shapes.items()})
