"""MAC counts and tables of `report`: against arithmetic by hand, and against the figures of the paper."""

from dataclasses import replace

import pytest
import timm

import papr_fx
from papr_fx.tracing.macs import count_macs_by_node

from ..models import Shape, ToyViT, toy_proposal


def vit_macs(tokens: int, patches: int, width: int, depth: int, patch: int, classes: int) -> int:
    """MACs of a ViT: the embedding, 12 C^2 N + 2 N^2 C per block, and the head."""
    block = 12 * width * width * tokens + 2 * tokens * tokens * width
    return patches * width * 3 * patch * patch + depth * block + width * classes


@pytest.mark.parametrize("fused", [True, False])
def test_counts_of_a_timm_vit(fused):
    model = timm.create_model("vit_small_patch16_224").eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    found = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, narrow=False, verify=False))
    assert found.dense_macs == vit_macs(197, 196, 384, 12, 16, 1000)
    assert found.pruned_macs == vit_macs(99, 196, 384, 12, 16, 1000)
    assert found.proposal_macs == 224 * 224 * 9 * (3 * 4 + 4 * 5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "z", "dense", "pruned"), [("vit_small_patch16_224", 0.45, 4.61, 2.29), ("vit_base_patch16_224", 0.5, 17.59, 8.98)]
)
def test_figures_of_the_paper(name, z, dense, pruned):
    """GMACs with MobileOne-S0 as proposal; Tab. 2 also counts a few operations that are not multiply-accumulates."""
    gm = papr_fx.transform(timm.create_model(name).eval(), timm.create_model("mobileone_s0"), z, narrow=False, verify=False)
    found = papr_fx.report(gm)
    assert found.dense_macs / 1e9 == pytest.approx(dense, rel=0.01)
    assert found.total_macs / 1e9 == pytest.approx(pruned, rel=0.03)


@pytest.mark.parametrize(
    ("name", "dense", "pruned"),
    [
        pytest.param("convnext_base", 15.38, 10.42, marks=pytest.mark.slow),
        pytest.param("swin_base_patch4_window7_224", 15.47, 12.25, marks=pytest.mark.slow),
    ],
)
def test_figures_of_the_paper_for_pixel_operators(name, dense, pruned):
    model = timm.create_model(name).eval().to("meta")
    found = papr_fx.report(papr_fx.transform(model, timm.create_model("mobileone_s0"), 0.65, verify=False))
    assert found.dense_macs / 1e9 == pytest.approx(dense, rel=0.01)
    assert found.total_macs / 1e9 == pytest.approx(pruned, rel=0.01)


def test_site_and_table():
    gm = papr_fx.transform(ToyViT(Shape(prefix=2)), toy_proposal(), 0.5)
    found = papr_fx.report(gm)
    assert (found.mode, found.z, found.model) == ("tokens", 0.5, "ToyViT")
    (site,) = found.sites
    assert (site.name, site.grid, site.prefix, site.dense, site.kept) == ("add -> blocks.0", (4, 4), 2, 18, 11)
    table = str(found)
    assert "add -> blocks.0" in table
    assert "4x4" in table
    papr_fx.set_keep_ratio(gm, 1.0)
    whole = papr_fx.report(gm)
    assert whole.sites[0].kept == 18
    assert whole.total_macs == whole.dense_macs == found.dense_macs


@pytest.mark.parametrize("z", [0.5, 1])
def test_a_proposal_that_costs_more_than_it_saves_is_named(z):
    """The toy proposal takes more MACs than the toy model; at z=1 it does not run."""
    gm = papr_fx.transform(ToyViT(Shape(image=(8, 8), patch=(4, 4))), toy_proposal(), z, verify=False)
    found = papr_fx.report(gm)
    assert (found.total_macs > found.dense_macs) == (z < 1)
    assert ("\nmore work than the dense model: take a lighter proposal" in str(found)) == (z < 1)
    assert ("or a smaller z" in str(found)) == (z < 1 and found.proposal_macs < found.dense_macs)
    lighter = replace(found, proposal_macs=found.dense_macs // 2, pruned_macs=found.dense_macs)
    assert "proposal_size, or a smaller z" in str(lighter)


def test_report_leaves_the_module_as_it_was():
    gm = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5).train()
    before = [(n.name, n.meta.get("shape")) for n in gm.graph.nodes]
    papr_fx.report(gm)
    assert [(n.name, n.meta.get("shape")) for n in gm.graph.nodes] == before
    assert gm.training


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "cait_xxs24_224"])
def test_reports_of_models_with_expanded_parameters(name):
    model = timm.create_model(name, depth=2).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    found = papr_fx.report(gm)
    assert 0 < found.pruned_macs < found.dense_macs
    assert all(p.requires_grad for p in model.parameters())


def test_report_of_a_meta_model():
    gm = papr_fx.transform(ToyViT(Shape()).to("meta"), toy_proposal(), 0.5, verify=False)
    real = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)
    assert papr_fx.report(gm) == papr_fx.report(real)


def test_macs_are_those_of_the_graph_that_runs():
    gm = papr_fx.transform(ToyViT(Shape(image=(32, 48))), toy_proposal(), 0.5, verify=False)
    counted = sum(count_macs_by_node(gm.for_shapes(), gm.graph, gm.example()).values())
    assert papr_fx.report(gm).total_macs == counted
