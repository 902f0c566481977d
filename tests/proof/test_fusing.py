"""Fusing: faults of attention that is one call, which no other part of the proof finds."""

import pytest
import torch

import papr_fx
from papr_fx.ops import attention_mask
from papr_fx.passes import fuse_attention
from papr_fx.passes.kinds import Kind
from papr_fx.proof import fusing
from papr_fx.tracing.roles import find_all

from ..models import toy_proposal
from ..models.windows import ToyWindows, WindowAttention
from .parts import OF_THE_WHOLE, case_of, failures, found_by_one


def planted(monkeypatch, change, rewrite=fuse_attention.rewrite):
    """The pass makes one change too many, in the last of the attentions."""

    def wrong(graph, sites):
        rewrite(graph, sites)
        change(graph, find_all(graph, Kind.FUSED)[-1])

    monkeypatch.setattr(fuse_attention, "rewrite", wrong)


def model() -> ToyWindows:
    return ToyWindows(WindowAttention(), WindowAttention())


def without_mask(graph, call):
    call.update_kwarg("attn_mask", None)


def without_windows(graph, call):
    mask = call.kwargs["attn_mask"]
    mask.args = mask.args[:2]


def of_other_windows(graph, call):
    with graph.inserting_before(call):
        call.update_kwarg("attn_mask", graph.call_method("roll", (call.kwargs["attn_mask"], 1, 0)))


def usual_scale(graph, call):
    call.update_kwarg("scale", None)


FAULTS = [without_mask, without_windows, of_other_windows, usual_scale]


@pytest.mark.parametrize("fault", FAULTS)
def test_only_fusing_finds_a_fault(monkeypatch, fault):
    planted(monkeypatch, fault)
    found = failures(case_of(model()))
    assert [name for name in found if name not in OF_THE_WHOLE] == ["fusing"]
    assert "with attention as one call, values are off by" in found["fusing"]


def test_masks_of_other_images_are_found(monkeypatch):
    """Repeated for each window instead of each image: one image alone would not show it."""

    def repeated(queries, terms, per_window=()):
        mask = attention_mask(queries[: per_window[0].shape[1]], terms, per_window)
        return mask.repeat_interleave(queries.shape[0] // mask.shape[0], 0)

    monkeypatch.setattr(fuse_attention, "attention_mask", repeated)
    assert found_by_one(case_of(model())) == ["fusing"]


def test_all_parts_hold_for_fused_attention():
    case = case_of(model())
    assert case.rewrite.fuses
    assert not failures(case)


def test_what_is_not_proved_is_written_out(monkeypatch):
    planted(monkeypatch, without_windows)
    gm = papr_fx.transform(model(), toy_proposal(), 0.5)
    found = papr_fx.report(gm)
    assert found.fused == 0
    assert "not fused: fusing: with attention as one call, values are off by" in str(found)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = gm(x)
    gm.train()
    assert torch.equal(gm(x), expected)  # the graph of training mode writes attention out


def zero_scores(own, q, k):
    return (q @ k.transpose(-2, -1)) * 0.0 + own.bias


def test_a_scale_that_does_not_matter_is_not_proved():
    case = case_of(ToyWindows(WindowAttention(zero_scores)))
    with pytest.raises(papr_fx.VerifyError, match="fusing: without its scale the attention `matmul_1` moves by only"):
        fusing.check(case)
