"""Attention as one call in what `transform` returns: when it is, and what stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.passes.kinds import Kind
from papr_fx.planning.module import PrunedModule, shell
from papr_fx.tracing.roles import find_all

from ..models import Shape, ToyViT, toy_proposal
from ..models.windows import ToyWindows, WindowAttention, WindowBlock

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64)


def pruned(model: nn.Module, **options) -> PrunedModule:
    return papr_fx.transform(model, toy_proposal(), 0.5, verify=False, **options)


def written_out(gm: PrunedModule) -> PrunedModule:
    """The same module with attention as the model writes it."""
    return PrunedModule(shell(gm), gm.plan.writing_out())


def fused(gm: PrunedModule) -> int:
    return len(find_all(gm.graph, Kind.FUSED))


def test_report_counts_fused_attentions():
    gm = pruned(ToyWindows(WindowAttention(), WindowAttention()))
    found = papr_fx.report(gm)
    assert found.fused == fused(gm) == 2
    assert "fused: 2 attentions that the model writes out are one call each" in str(found)
    other = papr_fx.report(written_out(gm))
    assert (other.fused, other.pruned_macs) == (0, found.pruned_macs)
    torch.testing.assert_close(gm(IMAGES), written_out(gm)(IMAGES), rtol=0, atol=1e-12)


def test_all_positions_are_the_dense_graph():
    model = ToyWindows()
    gm = pruned(model)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert fused(gm) == 0
    assert torch.equal(gm(IMAGES), model(IMAGES))
    papr_fx.set_keep_ratio(gm, 0.3)
    assert fused(gm) == 1
    torch.testing.assert_close(gm(IMAGES), written_out(gm)(IMAGES), rtol=0, atol=1e-12)


def test_training_mode_writes_attention_out():
    gm = pruned(ToyWindows())
    expected = gm(IMAGES)
    gm.train()
    assert fused(gm) == 0
    torch.testing.assert_close(gm(IMAGES), expected, rtol=0, atol=1e-12)
    assert fused(copy.deepcopy(gm).eval()) == fused(gm.eval()) == 1


def test_gradients_in_eval_mode_are_those_of_attention_that_is_written_out():
    found: list[dict[str, Tensor]] = []
    for make in (pruned, lambda model: written_out(pruned(model))):
        gm = make(ToyWindows())
        F.cross_entropy(gm(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
        found.append({name: p.grad for name, p in gm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"blocks.0.attention.bias", "blocks.0.attention.mask"}
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-13)


def test_half_precision():
    gm = pruned(ToyWindows()).to(torch.bfloat16)
    images = IMAGES.to(torch.bfloat16)
    assert gm(images).dtype == torch.bfloat16
    torch.testing.assert_close(gm(images), written_out(gm)(images), rtol=0.1, atol=0.1)


def test_autocast():
    gm = pruned(ToyWindows().float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gm(IMAGES.float()), written_out(gm)(IMAGES.float()), rtol=0.1, atol=0.1)


def test_export_holds_for_any_batch():
    gm = pruned(ToyWindows())
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(gm, (IMAGES,), dynamic_shapes=(batch,)).module()
    for count in (4, 3):
        torch.testing.assert_close(exported(IMAGES[:count]), gm(IMAGES[:count]), rtol=0, atol=1e-12)


def test_a_module_with_hooks_stays_whole():
    model = ToyWindows(WindowAttention(), WindowAttention())
    called: list[str] = []
    model.blocks[1].attention.register_forward_hook(lambda *_: called.append("hook"))
    gm = pruned(model)
    assert fused(gm) == 1
    gm(IMAGES)
    assert called == ["hook"]


class ReadsTheBatch(WindowAttention):
    """Its code reads the number of windows as a Python number, which a graph would keep."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(len(range(x.shape[0])), 4, 6))


def test_code_that_only_fusing_needs_stays_whole_if_it_cannot_be_recorded():
    model = ToyWindows(ReadsTheBatch(), WindowAttention())
    gm = pruned(model)
    assert fused(gm) == 0
    assert "blocks.0.attention" not in gm.plan.opened
    assert gm(IMAGES[:3]).shape == (3, 5)


class WholeGrid(WindowAttention):
    """Attention over all positions of a grid, whose code reads their number."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(1, 2)  # (B, n, 6)
        q, k, v = self.qkv(x).reshape(x.shape[0], len(range(x.shape[1])), 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * 0.7).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(-2)).reshape(shape)


class AnySizeBlock(WindowBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class AnySize(ToyWindows):
    """Such attention between convolutions that take images of any size."""

    sides: tuple[int, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = AnySizeBlock(self.blocks[0].attention)
        self.blocks[0].attention.__class__ = WholeGrid

    def forward(self, x: Tensor) -> Tensor:
        if self.sides and x.shape[-2:] != self.sides:
            raise ValueError(f"images are {self.sides}, not {x.shape[-2:]}")
        return super().forward(x)


class OneSize(AnySize):
    sides = (8, 8)


@pytest.mark.parametrize(("kind", "count"), [(AnySize, 0), (OneSize, 1)])
def test_fusing_costs_no_size_of_images(kind, count):
    gm = pruned(kind())
    assert gm.plan.target.dynamic == (kind is AnySize)
    assert fused(gm) == count


def unfused_vit() -> nn.Module:
    return ToyViT(Shape(pool="cls", fused=False)).eval()


@pytest.mark.parametrize(
    ("options", "written"), [({}, 1), ({"narrow": False}, 0), ({"background": "coarse", "narrow": False}, 0)]
)
def test_attention_of_tokens(options, written):
    """In the last block, where one row of queries is computed, it stays written out."""
    gm = pruned(unfused_vit(), **options)
    assert fused(gm) == len(gm.plan.eval.blocks) - written
    x = torch.randn(2, 3, *Shape().image)
    torch.testing.assert_close(gm(x), written_out(gm)(x), rtol=1e-4, atol=1e-4)


def test_the_proof_holds_for_tokens():
    gm = papr_fx.transform(unfused_vit(), toy_proposal(), 0.5, narrow=False)
    assert papr_fx.report(gm).fused == 2
