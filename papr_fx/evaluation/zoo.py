"""The architectures of timm, torchvision and transformers that take images or clips, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from torch import nn

from ..errors import ArgumentError
from ..planning.inputs import example_images
from ..proposals.network import takes_clips

# The families that are tried by default: transformers, and networks with the same block structure.
FAMILIES = {
    "timm": (
        *("vision_transformer", "vision_transformer_relpos", "vision_transformer_hybrid", "eva", "beit", "deit", "cait"),
        *("naflexvit", "convit", "qwen3_vit", "gemma4_vit", "deepseek_vit"),
        *("convnext", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "metaformer", "maxxvit", "focalnet"),
        *("davit", "xcit", "pvt_v2", "volo", "hiera", "mvitv2", "inception_next", "mambaout", "edgenext", "gcvit", "nest"),
        *("vitamin", "vision_transformer_sam"),
    ),
    "torchvision": ("vision_transformer", "swin_transformer", "convnext", "maxvit", "video.swin_transformer", "video.mvit"),
    "transformers": (
        *("aimv2", "beit", "chinese_clip", "clip", "convnext", "convnextv2", "cvt", "data2vec_vision", "deit", "dinov2"),
        *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "donut_swin", "focalnet", "hiera", "ijepa", "internvl"),
        *("levit", "metaclip_2", "mlcd", "mobilevit", "mobilevitv2", "pixio", "poolformer", "pvt", "pvt_v2", "segformer"),
        *("siglip", "siglip2", "swiftformer", "swin", "swinv2", "timesformer", "tipsv2", "videomae", "vit", "vit_msn"),
        *("vitdet", "vivit", "vjepa2"),
    ),
}
LIBRARIES = tuple(FAMILIES)


@dataclass(frozen=True)
class Architecture:
    """A model that a library builds by name, with random weights.

    Attributes:
        library: One of `LIBRARIES`.
        family: Its module in the library.
        name: Its name in the library; for transformers, the class, in its default configuration.
        depth: Number of blocks, if not its own: `depth` of timm's builders, `num_hidden_layers` of transformers.
    """

    library: str
    family: str
    name: str
    depth: int | None = None

    def create(self) -> nn.Module:
        """Builds the model in eval mode, on torch's default device."""
        if self.library == "timm":
            options: dict[str, Any] = {} if self.depth is None else {"depth": self.depth}
            return timm.create_model(self.name, **options).eval()
        if self.library == "transformers":
            import transformers

            kind = getattr(transformers, self.name)
            options = {} if self.depth is None else {"num_hidden_layers": self.depth}
            return kind._from_config(kind.config_class(**options)).eval()
        from torchvision.models import get_model

        return get_model(self.name, weights=None).eval()

    def images(self, model: nn.Module) -> torch.Tensor:
        """One image or clip of the size that the model states, by default 224 pixels and 16 frames."""
        try:
            return example_images(model, None)
        except ArgumentError:
            return example_images(model, torch.zeros(1, 3, *[16] * takes_clips(model), 224, 224))


def architectures(library: str, patterns: Sequence[str] = ()) -> list[Architecture]:
    """Lists the architectures of a library whose family or name matches a pattern.

    Args:
        library: "timm", "torchvision" (image and video classification) or "transformers" (classification models, vision towers
            and backbones, each in its default configuration).
        patterns: Shell patterns, such as "eva" or "convnext*" (default: `FAMILIES`).

    Raises:
        ArgumentError: There is no such library, or nothing matches.
    """
    if library == "timm":
        found = [
            Architecture("timm", family, name) for family in timm.list_modules() for name in timm.list_models(module=family)
        ]
    elif library == "torchvision":
        import torchvision.models as models

        names = {name: models.get_model_builder(name) for kind in (models, models.video) for name in models.list_models(kind)}
        prefix = f"{models.__name__}."
        found = [Architecture(library, build.__module__.removeprefix(prefix), name) for name, build in names.items()]
    elif library == "transformers":
        found = [Architecture(library, _family(kind), kind.__name__) for kind in _transformers_classes()]
    else:
        raise ArgumentError(f"library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    patterns = patterns or FAMILIES[library]
    chosen = [a for a in found if any(fnmatch(a.name, pattern) or fnmatch(a.family, pattern) for pattern in patterns)]
    if not chosen:
        raise ArgumentError(f"{library} has no model or family that matches {' or '.join(map(repr, patterns))}")
    return chosen


def _family(kind: type[nn.Module]) -> str:
    return kind.__module__.rpartition(".")[2].removeprefix("modeling_")


def _transformers_classes() -> list[type[nn.Module]]:
    """Classes whose input is an image or a clip: classification models, vision towers, and the models inside backbones."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    models = {key: names if isinstance(names, tuple) else (names,) for key, names in auto.MODEL_MAPPING_NAMES.items()}
    images, clips = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES
    chosen: list[str] = []
    for names in (*images.values(), *clips.values()):
        chosen += names if isinstance(names, tuple) else (names,)
    chosen += [name for names in models.values() for name in names if name.endswith("VisionModel")]
    chosen += [name for key in auto.MODEL_FOR_BACKBONE_MAPPING_NAMES for name in models.get(key, ())]
    kinds = [getattr(transformers, name) for name in dict.fromkeys(chosen)]
    return sorted(
        (kind for kind in kinds if kind.main_input_name in ("pixel_values", "pixel_values_videos")),
        key=lambda kind: (_family(kind), kind.__name__),
    )
