"""Models with and without gradient checkpoints, in the ways in which models call them."""

from functools import partial

import timm
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import papr_fx

from ..versions import CHECKPOINT_DECORATES, REGIONS_OF_TRANSFORMERS, switch_checkpoints_on
from .vits import Shape, ToyViT, enliven

MERGED = {"merge": papr_fx.Merge(2)}


def plainly(model, x):
    for block in model.blocks:
        x = block(x)
    return x


def by_block(model, x, **options):
    for block in model.blocks:
        x = checkpoint(block, x, **options)
    return x


def nested(model, x):
    def two(first, x):
        x = checkpoint(model.blocks[first], x, use_reentrant=False)
        return model.blocks[first + 1](x)

    return checkpoint(two, 2, checkpoint(two, 0, x, use_reentrant=False), use_reentrant=False)


decorated = (
    checkpoint(use_reentrant=False)(plainly) if CHECKPOINT_DECORATES else partial(checkpoint, plainly, use_reentrant=False)
)


def saves_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"context_fn": partial(create_selective_checkpoint_contexts, saves_products)}
SELECTIVE |= {"respect_saved_tensors_hooks": True} if CHECKPOINT_DECORATES else {}
OPTIONS = {"determinism_check": "none", "early_stop": False, "debug": False}


class User(ToyViT):
    """A model whose blocks run as `way` says. Its MLPs have dropout."""

    def __init__(self, way):
        super().__init__(Shape((16, 24), depth=4), width=16)
        self.way = way

    def forward(self, x):
        return self.classify(self.way(self, self.tokens(x)))


class Features(User):
    """Checkpoints all up to its last block."""

    def forward(self, x):
        def features(x):
            return self.way(self, self.tokens(x))

        return self.classify(features(x) if self.way is plainly else checkpoint(features, x, use_reentrant=False))


class Part(nn.Module):
    """A block that checkpoints its MLP."""

    def __init__(self, block, on):
        super().__init__()
        self.block, self.on = block, on

    def forward(self, x):
        x = x + self.block.attn(self.block.norm1(x))

        def mlp(x):
            return self.block.mlp(self.block.norm2(x))

        return x + (checkpoint(mlp, x, use_reentrant=False) if self.on else mlp(x))


def user(way):
    return lambda on: User(way if on else plainly)


def wrapped(on):
    model = User(plainly)
    for i in range(4 * on):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])
    return model


def in_parts(on):
    model = User(plainly)
    model.blocks = nn.ModuleList(Part(block, on) for block in model.blocks)
    return model


def of_timm(name, **options):
    def make(on):
        model = enliven(timm.create_model(name, num_classes=5, **options))
        model.set_grad_checkpointing(on)
        return model

    return make


def of_transformers(model, config, **options):
    def make(on):
        made = enliven(getattr(transformers, model)._from_config(getattr(transformers, config)(num_labels=5, **options)))
        if on:
            switch_checkpoints_on(made)
        return made

    return make


VIT = of_timm("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, num_heads=2, depth=2, drop_path_rate=0.4)
SWIN = of_timm("swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(2,), num_heads=(2,), drop_path_rate=0.4)
CONVNEXT = of_timm("convnext_atto", depths=(3, 0, 0, 0), dims=(16, 16, 16, 16), drop_path_rate=0.4)
HF_VIT = of_transformers(
    *("ViTForImageClassification", "ViTConfig"),
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 32, "patch_size": 4, "hidden_dropout_prob": 0.2},
)

# By name: the model with and without checkpoints, how it is transformed, and how many regions the code then has. Modules that
# are called whole checkpoint as they always did.
CASES = {
    "timm ViT": (VIT, {}, 2),
    "timm Swin": (SWIN, {"mode": "pixels"}, 2),
    "timm ConvNeXt": (CONVNEXT, {}, 3),
    "transformers ViT": (HF_VIT, {"narrow": False}, REGIONS_OF_TRANSFORMERS[0]),
    "transformers ViT, merged": (HF_VIT, MERGED | {"narrow": False}, REGIONS_OF_TRANSFORMERS[1]),
    "re-entrant": (user(partial(by_block, use_reentrant=True, **OPTIONS)), {}, 4),
    "selective": (user(partial(by_block, use_reentrant=False, **SELECTIVE)), {}, 4),
    "nested": (user(nested), {}, 4),
    "wrapper, merged": (wrapped, MERGED, 2),
    "embedding too": (lambda on: Features(decorated if on else plainly), {}, 2),
    "MLPs, merged": (in_parts, MERGED, 2),
    "sequential": (user(lambda m, x: checkpoint_sequential(list(m.blocks), 2, x, use_reentrant=False)), {}, 1),
}
