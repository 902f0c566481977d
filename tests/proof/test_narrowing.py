"""Narrowing: rows that are read although they were left out, or taken for others."""

import pytest
import torch
from torch import Tensor

import papr_fx
from papr_fx.passes import embed_kept_patches, narrow_rows
from papr_fx.passes.kinds import Kind
from papr_fx.proof import narrowing
from papr_fx.tracing.roles import find

from ..models import Shape, ToyViT, toy_proposal
from .parts import OF_THE_WHOLE, case_of, failures, found_by_one

CLASS = Shape(pool="cls", depth=1)


def wrong_row(graph, found, rewrite=narrow_rows.rewrite):
    """As the pass does it, but the last slice, which the residual addition gets, starts one row late."""
    rewrite(graph, found)
    last = find(graph, Kind.ROWS, 1)
    value, axis, start, count = last.args
    last.args = (value, axis, start + 1, count)


def test_only_narrowing_finds_a_wrong_row(monkeypatch):
    assert not failures(case_of(ToyViT(CLASS)))
    monkeypatch.setattr(narrow_rows, "rewrite", wrong_row)
    found = failures(case_of(ToyViT(CLASS)))
    assert [name for name in found if name not in OF_THE_WHOLE] == ["narrowing"]
    assert "with what nobody seems to read left out, the output is off by" in found["narrowing"]


def test_what_is_not_proved_is_computed_whole(monkeypatch):
    monkeypatch.setattr(narrow_rows, "rewrite", wrong_row)
    model = ToyViT(CLASS).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    found = papr_fx.report(gm)
    assert found.narrowed is None
    assert found.all_rows.startswith("narrowing: with what nobody seems to read left out")
    assert "not narrowed: narrowing: with what nobody seems to read left out" in str(found)
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(gm(x), papr_fx.transform(model, toy_proposal(), 0.5, narrow=False, verify=False)(x))


def wrong_patch(graph, found, site, keep, coarsened=None, rewrite=embed_kept_patches.rewrite):
    """As the pass does it, but with the indices of tokens, the class token counted, for those of patches."""
    rewrite(graph, found, site, keep, coarsened)
    node = find(graph, Kind.EMBEDDING)
    with graph.inserting_before(node):
        first = graph.create_node("call_method", "narrow", (keep, 1, 0, graph.call_method("size", (node.args[1], 1))))
    node.args = (node.args[0], first, *node.args[2:])


def test_only_narrowing_finds_a_wrong_patch(monkeypatch):
    monkeypatch.setattr(embed_kept_patches, "rewrite", wrong_patch)
    found = failures(case_of(ToyViT(CLASS)))
    assert [name for name in found if name not in OF_THE_WHOLE] == ["narrowing"]
    assert "with what nobody seems to read left out, the output is off by" in found["narrowing"]


def test_rows_stay_narrowed_where_patches_are_not_proved(monkeypatch):
    monkeypatch.setattr(embed_kept_patches, "rewrite", wrong_patch)
    found = papr_fx.report(papr_fx.transform(ToyViT(CLASS).eval(), toy_proposal(), 0.5))
    assert found.embedding == ""
    assert found.all_patches.startswith("narrowing: with what nobody seems to read left out")
    assert found.narrowed is not None


def wrong_quad(graph, found, site, keep, coarsened=None, rewrite=embed_kept_patches.rewrite):
    """As the pass does it, but the quads are those of images that were not halved."""
    rewrite(graph, found, site, keep, coarsened)
    node = find(graph, Kind.EMBEDDING)
    images, patches, conv, _, *rest = node.args
    node.args = (images, patches, conv, images, *rest)


def test_only_narrowing_finds_a_wrong_quad(monkeypatch):
    assert not failures(case_of(ToyViT(CLASS), background="coarse"))
    monkeypatch.setattr(embed_kept_patches, "rewrite", wrong_quad)
    assert found_by_one(case_of(ToyViT(CLASS), background="coarse")) == ["narrowing"]


class Ignored(ToyViT):
    """Its head multiplies the class token by zero: no row of the last block matters."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0] * 0)


def test_rows_that_do_not_matter_are_not_proved():
    case = case_of(Ignored(CLASS))
    assert case.rewrite.narrows
    with pytest.raises(papr_fx.VerifyError, match="narrowing: with other rows in their place the output moves by only"):
        narrowing.check(case)
