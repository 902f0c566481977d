"""docs/coverage.md lists every architecture, and what it says about them is still true."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import papr_fx
from papr_fx.evaluation import page, survey
from papr_fx.evaluation.columns import pruned, random_images
from papr_fx.evaluation.survey import Row
from papr_fx.evaluation.zoo import LIBRARIES, architectures
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, toy_proposal
from ..versions import AS_LISTED, TIMM_ON_META

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


ROWS = page.read(PAGE.read_text())
FIRST = {f"{a.library}, {a.family}": row for row in ROWS[::-1] if row.proof.startswith("proved") for a in [row.architecture]}


@AS_LISTED
def test_every_architecture_is_listed_or_its_family_named():
    (missing,) = re.findall(r"^Not tried: (.*)\.$", PAGE.read_text(), flags=re.MULTILINE)
    for library in LIBRARIES:
        names = [row.architecture.name for row in ROWS if row.architecture.library == library]
        every = architectures(library)
        assert names == [a.name for a in every if f"{a.family} ({library})" not in missing.split(", ")]


def test_the_page_starts_as_it_is_written():
    (version,) = re.findall(r"^torch (\S+); keep ratio 0.5;", PAGE.read_text(), flags=re.MULTILINE)
    assert PAGE.read_text().startswith(page.head(version, 0.5) + "Not tried: ")


def test_the_page_keeps_its_promises():
    """Nearly all plain token models of timm, most others; all of torchvision; a proof for every structure."""
    plain = ("vision_transformer", "eva", "beit", "deit", "vision_transformer_relpos", "vision_transformer_hybrid", "cait")
    plain += ("naflexvit", "convit", "qwen3_vit", "gemma4_vit", "deepseek_vit")
    timm_rows = [row for row in ROWS if row.architecture.library == "timm" and row.architecture.family in plain]
    refused = [row.architecture.name for row in timm_rows if row.mode != "tokens"]
    assert len(timm_rows) == 322
    assert len(refused) <= 7, refused
    others = [row for row in ROWS if row.architecture.library == "timm" and row.architecture.family not in plain]
    assert len(others) == 274
    assert sum(bool(row.mode) for row in others) >= 250
    assert all(row.mode for row in ROWS if row.architecture.library == "torchvision")
    names = {row.architecture.name for row in ROWS if row.proof.startswith("proved")}
    assert all(row.proof.removeprefix("as ") in names for row in ROWS if row.proof.startswith("as "))
    assert all(row.proof.startswith(("proved", "as ")) == bool(row.mode) for row in ROWS)
    assert not [row for row in ROWS if row.bfloat16 not in ("", "yes")]


def test_the_page_is_read_as_it_was_written():
    assert PAGE.read_text().endswith(f"\n\n{page.tables(ROWS)}\n")


def again(row: Row) -> Row:
    return survey.transformed(row.architecture, 0.5, mode=row.mode or "auto", output=row.output, weights=False)


# One of each kind: tokens, pixels, windows, clips; the others take minutes.
QUICK = {
    *("timm, vision_transformer", "timm, convnext", "timm, cait", "timm, pvt_v2", "timm, naflexvit"),
    *("torchvision, vision_transformer", "torchvision, swin_transformer"),
    *("transformers, clip", "transformers, dinov2_with_registers", "transformers, convnextv2"),
}


def test_the_quick_families_are_on_the_page():
    assert FIRST.keys() >= QUICK


def marks(name):
    return [TIMM_ON_META] * name.startswith("timm") + [pytest.mark.slow] * (name not in QUICK)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("row", [pytest.param(row, id=name, marks=marks(name)) for name, row in FIRST.items()])
def test_one_of_every_family(row):
    found = again(row)
    assert (found.mode, found.sites, found.positions) == (row.mode, row.sites, row.positions), found.reason


@AS_LISTED
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row.architecture.name for row in ROWS])
def test_every_row(row):
    if row.mode:
        found = again(row)
        assert (found.mode, found.sites, found.positions) == (row.mode, row.sites, row.positions), found.reason


class Rounding(TorchDispatchMode):
    """Notes whether any operation gives floating-point numbers of less than float64."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        values = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        self.seen |= any(value.is_floating_point() and value.dtype != torch.float64 for value in values)
        return out


def computes_in_float64(gm, x):
    """Whether the dense model does, all the way."""
    dense = sibling(gm, z=1.0)  # runs no proposal, whose map is of float32
    with Rounding() as noted:
        dense(x)
    return not noted.seen


@pytest.mark.parametrize("rounds", [False, True])
@torch.no_grad()
def test_dtypes_inside_are_seen(rounds):
    class Block(nn.Module):
        def forward(self, x):
            return x.float().double() if rounds else x

    model = ToyViT(Shape()).double().eval()
    model.norm = nn.Sequential(model.norm, Block())
    x = torch.randn(2, 3, 8, 12).double()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x, verify=False)
    assert computes_in_float64(gm, x) == (not rounds)


PROVED = [row for row in ROWS if row.mode == "tokens" and row.proof.startswith("proved")]


@AS_LISTED
@pytest.mark.slow
@pytest.mark.parametrize("row", PROVED, ids=[row.architecture.name for row in PROVED])
@torch.no_grad()
def test_narrowed_models_compute_what_others_do(row):
    """One of each structure, in float64; a model that rounds to float32 inside differs by such roundings."""
    gm = pruned(row, 0.5, torch.float64)
    x = random_images(gm)
    tolerance = 1e-12 if computes_in_float64(gm, x) else 1e-5
    assert relative_error(gm(x), sibling(gm, narrow=False)(x)) < tolerance
