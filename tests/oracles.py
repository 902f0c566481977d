"""Reference results that share no code with the passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papr_fx.proof.hidden_keys import HiddenKeys

from .models import ToyViT


def at_first_block(model: nn.Module, name: str, keep: Tensor, x: Tensor) -> Tensor:
    """The model run on the tokens `keep` (B, K): the first call of block `name` receives only these."""

    def pick(_module, args):
        handle.remove()
        return tuple(a.gather(1, keep[..., None].expand(-1, -1, a.shape[-1])) if isinstance(a, Tensor) else a for a in args)

    handle = model.get_submodule(name).register_forward_pre_hook(pick)
    return model(x)


def kept_tokens(mask: Tensor, prefix: int) -> Tensor:
    """Indices (B, prefix + k) of the prefix tokens and of the kept positions of a mask (B, *grid), in order."""
    kept = torch.stack([sample.flatten().nonzero()[:, 0] for sample in mask]) + prefix
    return torch.cat([torch.arange(prefix).expand(len(mask), prefix), kept], dim=1)


def with_hidden_keys(model: ToyViT, mask: Tensor, x: Tensor) -> Tensor:
    """The model's output from the kept tokens after its last block, all others hidden from every attention."""
    hidden = torch.cat([torch.zeros(len(mask), model.shape.prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    seen: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with HiddenKeys(hidden):
        model(x)
    handle.remove()
    return model.classify(seen[0][~hidden].view(len(mask), -1, seen[0].shape[-1]))


def resized_by_hand(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Maps (B, t, h, w) resized to a grid."""
    return F.interpolate(maps.unsqueeze(1), grid, mode="trilinear", align_corners=True).squeeze(1)


def kept_by_hand(psm: Tensor, z: float, prefix: int) -> Tensor:
    """Mask of the kept positions of maps (B, t, h, w), by a full sort."""
    count = max(1, min(psm[0].numel(), int((psm[0].numel() + prefix) * z)))
    order = psm.flatten(1).argsort(dim=1, descending=True)[:, :count]
    return torch.zeros_like(psm, dtype=torch.bool).flatten(1).scatter(1, order, True).view_as(psm)
