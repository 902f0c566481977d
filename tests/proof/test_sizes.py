"""Part 15 of the proof: another image size."""

import pytest
import torch
from torch import Tensor

import papr_fx
from papr_fx import ops
from papr_fx.passes import embed_kept_patches, prune_tokens, splice_proposal
from papr_fx.proof import sizes
from papr_fx.proof.case import Case

from ..models import Shape, ToyViT, toy_proposal
from ..models.hierarchical import FAMILIES
from ..models.traps import Sized
from .parts import failures


def case_of(model, size=(8, 12)):
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, *size), verify=False)
    assert gm.plan.target.sizes
    return Case.of(model, gm, torch.float64)


def test_a_model_of_several_sizes():
    assert not failures(case_of(Sized().double().eval()))


@pytest.mark.parametrize("module", [embed_kept_patches, prune_tokens], ids=["of images", "of the grid"])
def test_rows_and_columns_exchanged(module, monkeypatch):
    real = splice_proposal.read_sizes
    monkeypatch.setattr(module, "read_sizes", lambda graph, source, axes, *rest: real(graph, source, axes, *rest)[::-1])
    model = Sized().double().eval()
    if module is prune_tokens:  # its patches are embedded by what is no convolution alone
        model.proj.register_forward_hook(lambda _m, _i, out: out * 1)
    found = failures(case_of(model))
    assert "sizes" in found


def test_an_operator_that_is_wrong_at_other_sizes_alone(monkeypatch):
    def embedded(images, keep, conv):
        return ops.embed_patches(images if images.shape[-1] == 12 else images.flip(-1), keep, conv)

    monkeypatch.setattr(embed_kept_patches, "embed_patches", embedded)
    assert list(failures(case_of(Sized().double().eval()))) == ["sizes"]


@pytest.mark.parametrize("size", [(9, 13), (11, 14)])
def test_images_that_patches_do_not_cover(size):
    """Its convolution leaves pixels over; another model might pad them."""
    case = case_of(Sized().double().eval())
    object.__setattr__(case.rewrite.plan.target, "sizes", ((1, 3, *size),))
    sizes.check(case)


def test_grids_of_pixel_operators():
    family = FAMILIES["ConvNeXt"]
    sizes.check(case_of(family.model(), family.size))


def test_a_model_whose_graph_holds_for_the_traced_size_alone(monkeypatch):
    """Its graph is refused at other sizes, and as it was at the traced one."""

    def embedded(images, keep, conv):
        return ops.embed_patches(images if images.shape[-1] == 12 else images.flip(-1), keep, conv)

    model, x = Sized().double().eval(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    right = papr_fx.transform(model, toy_proposal(), 0.5)
    right(torch.randn(2, 3, 12, 18, dtype=torch.float64))
    monkeypatch.setattr(embed_kept_patches, "embed_patches", embedded)
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert torch.equal(gm(x), right(x))
    with pytest.raises(papr_fx.ArgumentError, match="was transformed for images of 8 x 12, not 12 x 18"):
        gm(torch.randn(2, 3, 12, 18, dtype=torch.float64))


class Maps(ToyViT):
    """Lays its tokens out as a grid that it knows."""

    def classify(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 3, 3)


def test_a_single_patch_to_which_a_whole_table_is_added():
    """On a smaller image one patch becomes nine tokens, by broadcasting. The graph does not run there, and refuses it."""
    model = Maps(Shape(image=(6, 9), prefix=0)).double().eval()
    assert model(torch.zeros(1, 3, 3, 4, dtype=torch.float64)).shape == (1, 8, 3, 3)
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    with pytest.raises(papr_fx.ArgumentError, match="was transformed for images of 6 x 9, not 3 x 4"):
        gm(torch.zeros(1, 3, 3, 4, dtype=torch.float64))
