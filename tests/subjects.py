"""Models of unlike structure on which faults act. Small ones: it is the structure that a fault needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torchvision.models.maxvit import MaxVit

from .models import Shape, ToyViT, attentions, branches, embeddings, enliven, lengths, rows, toy_proposal, traps
from .models.clips import ClipViT, JointViT, clip_proposal
from .models.hierarchical import FAMILIES
from .models.positioned import positioned
from .models.windows import ToyWindows, WindowAttention, over_queries

_TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Subject:
    """A model, and how it is transformed.

    Attributes:
        name: What it is.
        model: Builds it; in eval mode, with parameters that do not hide a fault.
        shape: Shape of one image or clip.
        z: Keep ratio.
        proposal: Builds its proposal, if it takes one.
        options: Options of `transform`. A callable is called for its value.
        sizes: Another shape that it takes; empty if it takes one.
    """

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    z: float = 0.5
    proposal: Callable[[], nn.Module | None] = toy_proposal
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sizes: tuple[int, ...] = ()

    def built(self) -> nn.Module:
        """The model."""
        torch.manual_seed(0)
        return self.model().double().eval()


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: enliven(timm.create_model(name, **{"num_classes": 5, **options}))


def _vit(name: str, **options: Any) -> Callable[[], nn.Module]:
    return _timm(name, **{"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 3, **options})


def _huggingface(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: enliven(getattr(transformers, kind)(getattr(transformers, config)(**{**_TINY, **options})))


def _depth() -> nn.Module:
    backbone = transformers.Dinov2Config(
        **_TINY, image_size=56, patch_size=14, reshape_hidden_states=False, out_features=["stage1", "stage2"]
    )
    neck = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "fusion_hidden_size": 8}
    sizes = {"reassemble_hidden_size": 16, "head_hidden_size": 8, "patch_size": 14}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, **neck, **sizes)
    return enliven(transformers.DepthAnythingForDepthEstimation(config))


def _conv_proposal() -> nn.Module:
    """A classifier with batch norms, and statistics unlike the model's."""
    torch.manual_seed(1)
    return enliven(timm.create_model("mobilenetv2_035", num_classes=6)).eval()


def _maxvit() -> nn.Module:
    sizes = {"stem_channels": 8, "partition_size": 2, "block_channels": [8], "block_layers": [1], "head_dim": 4}
    return enliven(MaxVit((64, 64), **sizes, stochastic_depth_prob=0.0, num_classes=5))


def _attending(make: Callable[[], nn.Module], **shape: Any) -> Callable[[], nn.Module]:
    return lambda: attentions.with_attention(make, **shape)


def _family(name: str, **options: Any) -> Subject:
    family = FAMILIES[name]
    return Subject(name, family.model, (3, *family.size), **options)


def _merge(kind: str, **options: Any) -> Callable[[Any], Any]:
    return lambda papr_fx: getattr(papr_fx if kind == "Merge" else papr_fx.peers, kind)(**options)


_TOY = 3, 8, 12
_SQUARE: dict[str, Any] = {"image": (8, 8), "patch": (2, 2)}
_PIXELS = {"mode": "pixels"}
_COARSE = {"background": "coarse"}
_MERGED = {"merge": _merge("Merge", r=2)}
_ALL_MERGED = {"merge": _merge("Merge", r=2, blocks="all")}
_CLIP = 3, 6, 12, 9

SUBJECTS = (
    Subject("ViT, class token", lambda: ToyViT(Shape(pool="cls")), _TOY),
    Subject(
        "ViT, no prefix, unfolded, attention written out",
        lambda: ToyViT(Shape(prefix=0, embed="unfold", pool="map", fused=False)),
        _TOY,
    ),
    Subject(
        "ViT, two prefix tokens, mean of patches", lambda: ToyViT(Shape(prefix=2, embed="linear", pool="patches")), _TOY, 0.29
    ),
    Subject(
        "ViT, order of queries, keys and values its own",
        _attending(lambda: attentions.Separate(8, 2, True), prefix=2, pool="cls"),
        _TOY,
    ),
    Subject("ViT, rotary table", lambda: positioned(Shape(prefix=1, pool="cls"), "rotary"), _TOY),
    Subject("ViT, numbered positions", lambda: positioned(Shape(prefix=0), "numbered"), _TOY),
    Subject("ViT, several sizes", traps.Sized, _TOY, sizes=(3, 12, 18)),
    Subject("ViT, sizes with a number of the traced one", traps.Ranked, _TOY, sizes=(3, 12, 18)),
    Subject("ViT, tokens behind the patches", traps.Behind, _TOY),
    Subject("ViT, sequence first", traps.SequenceFirst, _TOY),
    Subject("ViT, other code in training", lambda: traps.Training(Shape(pool="cls")), _TOY),
    Subject("ViT, grid that is pooled", lambda: traps.Pooled(Shape()), _TOY),
    Subject("ViT, grid that is convolved", traps.Columns, _TOY),
    Subject("ViT, grid that is returned, zeros", lambda: traps.Gridded(Shape()), _TOY, options={"restore": "zero"}),
    Subject("ViT, images and tokens changed in place", lambda: traps.Changing(Shape()), _TOY),
    Subject(
        "ViT, merged",
        lambda: ToyViT(Shape(depth=4, pool="patches")),
        _TOY,
        0.8,
        options=_ALL_MERGED,
    ),
    Subject(
        "ViT, fused tokens",
        lambda: ToyViT(Shape(depth=4, prefix=0)),
        _TOY,
        0.9,
        options={"merge": _merge("TokenFusion", r=2, linear_from=1)},
    ),
    Subject("ViT, propagated", lambda: ToyViT(Shape(depth=3)), _TOY, 0.9, options={"merge": _merge("TokenPropagation", r=2)}),
    Subject(
        "ViT, pruned by attention",
        lambda: ToyViT(Shape(depth=3, pool="cls")),
        _TOY,
        0.9,
        options={"merge": _merge("AttentionPruning", r=2)},
    ),
    Subject("ViT, coarse", lambda: ToyViT(Shape(image=(10, 15), pool="cls")), (3, 10, 15), options=_COARSE),
    Subject("ViT, coarse, rotary and tokens behind", traps.Behind, _TOY, options=_COARSE),
    Subject("timm ViT, proposal of its own statistics", _vit("vit_tiny_patch16_224"), (3, 64, 64), proposal=_conv_proposal),
    Subject(
        "timm ViT, expected CAM at another size",
        _vit("vit_tiny_patch16_224"),
        (3, 64, 64),
        proposal=_conv_proposal,
        options={"saliency": "expected-cam", "proposal_size": 128},
    ),
    Subject("timm ViT, any size", _vit("vit_tiny_patch16_224", dynamic_img_size=True), (3, 64, 64), sizes=(3, 80, 96)),
    Subject("timm ViT, distilled", _vit("deit_tiny_distilled_patch16_224"), (3, 64, 64)),
    Subject("timm EVA-02", _timm("eva02_tiny_patch14_224", img_size=56, embed_dim=32, num_heads=2, depth=2), (3, 56, 56)),
    Subject("timm BEiT", _timm("beit_base_patch16_224", img_size=64, embed_dim=32, num_heads=2, depth=2), (3, 64, 64)),
    Subject(
        "transformers YOLOS",
        _huggingface("YolosForObjectDetection", "YolosConfig", image_size=[48, 64], patch_size=8, num_detection_tokens=3),
        (3, 48, 64),
    ),
    Subject(
        "transformers CLIP tower", _huggingface("CLIPVisionModel", "CLIPVisionConfig", image_size=32, patch_size=8), (3, 32, 32)
    ),
    Subject("transformers Depth Anything", _depth, (3, 56, 56)),
    Subject("clip ViT", lambda: ClipViT((3, 3, 3), 1), _CLIP, proposal=clip_proposal),
    Subject("clip ViT of frames", lambda: JointViT(1, at_once=False), (3, 4, 12, 6)),
    Subject(
        "clip ViT, motion times map, coarse",
        lambda: ClipViT((3, 3, 3), 1),
        _CLIP,
        options={"saliency": "motion*psm", "background": "coarse"},
    ),
    Subject("two trunks", traps.Twins, _TOY),
    Subject("two trunks of unlike blocks", lambda: traps.Twins(3, 12), _TOY),
    Subject("ViT by pixels", lambda: branches.branches_first(**_SQUARE, pool="cls"), (3, 8, 8), options=_PIXELS),
    Subject("ViT by pixels, several sizes", lambda: traps.Sized(**_SQUARE), (3, 8, 8), options=_PIXELS, sizes=(3, 12, 16)),
    Subject("causal attention", _attending(lambda: attentions.Causal(8, 2, True), pool="cls"), _TOY),
    Subject("causal attention, averaged", _attending(lambda: attentions.Causal(8, 2, True)), _TOY),
    Subject(
        "causal attention, merged",
        _attending(lambda: attentions.Causal(8, 2, True)),
        _TOY,
        1.0,
        options=_MERGED,
    ),
    Subject("attention with a mask, merged", lambda: positioned(Shape(), "bias"), _TOY, 1.0, options=_MERGED),
    Subject("heads of torch, sequence first, merged", traps.SequenceFirst, _TOY, 0.9, options=_MERGED),
    Subject("heads of torch with dropout, merged", _attending(attentions.Heads), _TOY, 0.9, options=_MERGED),
    Subject("means of channels, merged", lambda: traps.Averaging(Shape(depth=3)), _TOY, 0.9, options=_MERGED),
    Subject("attention written out, sums multiplied", _attending(lambda: attentions.Written("product")), _TOY),
    Subject("attention written out, weights that are read", _attending(lambda: attentions.Written("told")), _TOY),
    Subject("attention written out, keys that change", _attending(lambda: attentions.Written("changed")), _TOY),
    Subject("attention written out, dropout", _attending(lambda: attentions.Written("dropout")), _TOY),
    Subject(
        "attention with a mask of the tokens, merged",
        _attending(lambda: attentions.Masked(8, 2, True), depth=4),
        _TOY,
        0.9,
        options=_MERGED,
    ),
    Subject("ViT, columns interleaved", _attending(lambda: attentions.Interleaved(8, 2, True), pool="cls"), _TOY),
    Subject("ViT, as many channels as patches, bias", lambda: positioned(Shape(image=(4, 12), prefix=0), "bias"), (3, 4, 12)),
    Subject("grid whose windows are averaged", lambda: traps.Padded(Shape()), _TOY),
    Subject("grids stacked along the batch", traps.Stacked, _TOY),
    Subject("a decoder on the grid", traps.Decoded, _TOY),
    Subject("a token between patches", lambda: traps.Between(Shape()), _TOY),
    Subject("tokens summed up", lambda: traps.Mixed(Shape()), _TOY),
    Subject("a number read from the batch", lambda: traps.Batched(Shape()), _TOY),
    Subject("a number read from the tokens", lambda: traps.Counted(Shape()), _TOY),
    Subject("random numbers in training", lambda: traps.Drawing(Shape()), _TOY),
    Subject("a slice by number", lambda: traps.Sliced(Shape()), _TOY),
    Subject("overlapping patches, coarse", traps.Overlapping, _TOY, options=_COARSE),
    Subject("tokens times whole numbers, coarse", _attending(lambda: attentions.Numbered(8, 2, True)), _TOY, options=_COARSE),
    Subject("images changed in place, coarse", lambda: embeddings.Rescaled(Shape()), _TOY, options=_COARSE),
    Subject("two embeddings, one of them averaged", lambda: embeddings.Twice(Shape(pool="cls")), _TOY),
    Subject("rotary table, merged", lambda: positioned(Shape(prefix=1), "rotary"), _TOY, 1.0, options=_ALL_MERGED),
    Subject(
        "ViT, merged late",
        lambda: ToyViT(Shape(depth=4)),
        _TOY,
        1.0,
        options={"merge": _merge("Merge", r=2, blocks="all", schedule="late")},
    ),
    Subject(
        "ViT, half of it merged", lambda: ToyViT(Shape()), _TOY, 1.0, options={"merge": _merge("Merge", r=9, blocks="all")}
    ),
    Subject("grid that is returned, coarse", lambda: traps.Gridded(Shape()), _TOY, options=_COARSE),
    Subject(
        "skips past blocks, merged",
        lambda: embeddings.Skips(Shape()),
        _TOY,
        1.0,
        options=_ALL_MERGED,
    ),
    Subject("patches normalised together", lambda: traps.Normalised(Shape()), _TOY),
    Subject("embeddings that are read twice", lambda: traps.Decoding(Shape()), _TOY),
    Subject("patches dropped in training", lambda: traps.Dropped(Shape()), _TOY),
    Subject("class token, batch norm in the last block", rows.BatchNormed, _TOY),
    Subject("class token divided by the number of tokens", lambda: rows.PerToken(Shape(pool="cls")), _TOY),
    Subject("class token, queries changed in place", _attending(lambda: rows.Shared(8, 2, True), pool="cls"), _TOY),
    Subject("class token, every second column", _attending(rows.Sparse, pool="cls"), _TOY),
    Subject("class token, columns shuffled", _attending(lambda: rows.Shuffled(8, 2, True), pool="cls"), _TOY),
    Subject("largest of four patches", lengths.Pooling, _TOY, 0.95),
    Subject("ends of equal length", lengths.EqualEnds, _TOY),
    Subject("grid that is smoothed", lambda: lengths.Smoothed(Shape()), _TOY),
    Subject("tokens picked by number", _attending(lambda: lengths.Picking(8, 2, True)), _TOY),
    Subject("biases that fade in place", lengths.Fading, _TOY),
    Subject("tables times a number for each token", lengths.gated, _TOY),
    Subject("coarse, tables without the tokens behind", lengths.ended, _TOY, options=_COARSE),
    Subject("a table that is asked for its length", lengths.asking, _TOY),
    Subject("padded images, coarse", lengths.Rounded, (3, 7, 12), options=_COARSE),
    Subject("padded patches", lengths.Offset, (3, 32, 32)),
    _family("ConvNeXt"),
    _family("ConvNeXt V2", z=0.4),
    _family("Swin", z=0.65),
    _family("Swin, padded windows"),
    _family("torchvision SwinV2"),
    Subject("toy windows", ToyWindows, (3, 8, 8)),
    Subject("toy windows, softmax over queries", lambda: ToyWindows(WindowAttention(weights=over_queries)), (3, 8, 8)),
    Subject("batch norm in branches", traps.ConvNet, (3, 16, 24)),
    Subject("norms over space in branches", traps.SpaceNormed, (3, 16, 24)),
    Subject("MLP on positions in one axis", branches.Flat, (3, 16, 16), options=_PIXELS),
    Subject("rows and columns exchanged", lambda: branches.ConvTrunk(branches.TransposedBlock()), (3, 16, 16)),
    Subject("branches that others read", branches.Telling, (3, 16, 16)),
    Subject("grouped convolutions", lambda: branches.ConvTrunk(branches.ConvBlock(4), branches.ConvBlock(8)), (3, 16, 16)),
    Subject("two entries", lambda: branches.ConvTrunk(branches.GatedBlock()), (3, 16, 16)),
    Subject(
        "means that scale branches", lambda: branches.ConvTrunk(branches.ExcitedBlock(), branches.ConvBlock()), (3, 16, 16)
    ),
    Subject("branches that start elsewhere", branches.Elsewhere, (3, 16, 16)),
    Subject("windows of bounded values", branches.BoundedWindows, (3, 8, 8)),
    Subject("torchvision MaxViT", _maxvit, (3, 64, 64)),
)
