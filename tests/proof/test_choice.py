"""Part 14 of the proof: what the module itself keeps."""

import pytest
import torch

import papr_fx
from papr_fx import ops
from papr_fx.proof import choice
from papr_fx.proof.case import Case
from papr_fx.proposals import network, saliency

from ..models import Shape, ToyViT, toy_proposal
from ..models.clips import ClipViT
from ..models.hierarchical import FAMILIES
from .parts import case_of, failures

QUADS = {"background": "coarse"}
OWN = ["choice", "sizes"]  # the parts that run the module's own graph: the model takes images of other aspects


def worst(psm, z, prefix=0, suffix=0):
    return ops.top_positions(-psm, z, prefix, suffix)


def one_more(psm, z, prefix=0, suffix=0):
    return ops.top_positions(psm, z + 1 / 17, prefix, suffix)


def unsorted(psm, z, prefix=0, suffix=0):
    keep = ops.top_positions(psm, z, prefix, suffix)
    return torch.cat([keep[:, :prefix], keep[:, prefix:].flip(1)], dim=1)


def of_the_first_image(psm, z, prefix=0, suffix=0):
    return ops.top_positions(psm[:1].expand_as(psm), z, prefix, suffix)


def by_area(significance, grid):
    return torch.nn.functional.interpolate(significance.unsqueeze(1), tuple(grid), mode="bicubic").squeeze(1)


def worst_quads(psm, z, prefix=0, suffix=0):
    return ops.choose_quads(-psm, z, prefix, suffix)


def fewer_quads(psm, z, prefix=0, suffix=0):
    return ops.choose_quads(psm, z - 0.2, prefix, suffix)


def planted(case: Case, wrong, instead_of) -> Case:
    """The case of a module whose own graph calls another function."""
    (graph,) = case.own.values()
    (node,) = graph.find_nodes(op="call_function", target=instead_of)
    node.target = wrong
    return case


@pytest.mark.parametrize("options", [{}, QUADS], ids=["drop", "coarse"])
def test_right_choices_pass(options):
    assert not failures(case_of(ToyViT(Shape(prefix=2, pool="cls")), **options))


@pytest.mark.parametrize("wrong", [worst, one_more, unsorted, of_the_first_image], ids=lambda f: f.__name__)
def test_wrong_choice(wrong):
    found = failures(planted(case_of(ToyViT(Shape())), wrong, ops.top_positions))
    assert list(found) == (["choice"] if wrong is of_the_first_image else OWN)  # of another size one image is enough


def test_wrong_map():
    assert list(failures(planted(case_of(ToyViT(Shape())), by_area, ops.resize_map))) == OWN


@pytest.mark.parametrize("wrong", [worst_quads, fewer_quads], ids=lambda f: f.__name__)
def test_wrong_quads(wrong):
    case = planted(case_of(ToyViT(Shape(image=(10, 15))), **QUADS), wrong, ops.choose_quads)
    assert list(failures(case)) == ["choice"]


def test_wrong_gather():
    case = case_of(ToyViT(Shape()))
    planted(case, lambda tokens, keep: ops.gather_tokens(tokens, (keep + 1) % 17), ops.gather_tokens)
    assert list(failures(case)) == OWN


def test_maps_of_several_clips_that_are_mixed():
    model = ClipViT((3, 3, 3), 1).double().eval()
    clips = torch.zeros(1, 3, 6, 12, 9, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal().double(), 0.5, example_input=clips, saliency=lambda f: f.amax(1))
    (map_node,) = [node for node in gm.graph.nodes if node.name == "papr_map"]
    case = Case.of(model, gm, torch.float64)
    choice.check(case)
    with gm.graph.inserting_after(map_node):
        mixed = gm.graph.call_method("roll", (map_node, 1, 0))
    map_node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    mixed.meta["role"] = map_node.meta.pop("role")
    assert "that of each image by itself" in failures(Case.of(model, gm, torch.float64))["choice"]


def test_each_grid_of_pixel_operators_is_looked_at():
    family = FAMILIES["ConvNeXt"]
    model = family.model()
    gm = papr_fx.transform(model, toy_proposal(), 0.4, example_input=torch.zeros(1, 3, 64, 64), verify=False)
    last = gm.graph.find_nodes(op="call_function", target=ops.top_positions)[-1]
    last.target = worst
    with pytest.raises(papr_fx.VerifyError, match=r"choice: at z=0.4, on grid \(2, 2\)"):
        choice.check(Case.of(model, gm, torch.float64))


def test_the_transform_itself_refuses(monkeypatch):
    monkeypatch.setattr("papr_fx.ops.positions.keep_count", lambda n, z, others=0: int((n + others) * z) + 1)
    with pytest.raises(papr_fx.VerifyError, match="choice: at z=0.5"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)


def test_a_map_that_is_no_mean(monkeypatch):
    monkeypatch.setattr(saliency.Mean, "forward", lambda self, features, *_: features.amax(self.axis))
    assert "that of each image by itself" in failures(case_of(ToyViT(Shape())))["choice"]


@pytest.mark.parametrize("size", [16, (12, 20)])
@pytest.mark.parametrize("of_features", ["psm", lambda features: features.amax(1)], ids=["mean", "maximum"])
def test_the_map_of_images_at_another_size_with_other_statistics(size, of_features, monkeypatch):
    stats = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.0, 0.1, 0.0), (1.0, 0.9, 0.8))
    case = case_of(ToyViT(Shape()), proposal_size=size, input_stats=stats, saliency=of_features)
    choice.check(case)
    case.root.papr_proposal.shift = None
    choice.check(case)  # neither uses it
    case.root.papr_proposal.scale, real = None, network.SignificanceNet.forward
    monkeypatch.setattr(network.SignificanceNet, "forward", lambda self, images: real(self, images + 0.1 * images.square()))
    assert "that of each image by itself" in failures(case)["choice"]
