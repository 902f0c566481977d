"""What docs/coverage.md lists still works, and the survey behind it tells structures apart."""

import re
from pathlib import Path

import pytest
import torch

import papr_fx
from papr_fx.evaluation import survey as coverage
from papr_fx.evaluation.survey import Architecture, Row

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def listed() -> list[Row]:
    """The rows of the page, read back."""
    rows = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        library = section.split()[0]
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
        for family, name, mode, sites, positions, proof in (cells for cells in lines if len(cells) == 6):
            if family == "family" or set(family) <= {"-"}:
                continue
            word, _, output = mode.partition(" ")
            rows.append(
                Row(
                    Architecture(library, family, name),
                    "" if word == "refused" else word,
                    output.strip("()") or "logits",
                    int(sites or 0),
                    positions,
                    proof,
                )
            )
    return rows


ROWS = listed()
FIRST = {f"{a.library}, {a.family}": row for row in ROWS[::-1] if row.proof.startswith("proved") for a in [row.architecture]}


def test_every_architecture_is_listed_or_its_family_named():
    (missing,) = re.findall(r"^Not tried: (.*)\.$", PAGE.read_text(), flags=re.MULTILINE)
    for library in coverage.LIBRARIES:
        names = [row.architecture.name for row in ROWS if row.architecture.library == library]
        every = coverage.architectures(library)
        assert names == [a.name for a in every if f"{a.family} ({library})" not in missing.split(", ")]


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


def again(row: Row) -> Row:
    return coverage.transformed(row.architecture, 0.5, mode=row.mode or "auto", output=row.output, weights=False)


@pytest.mark.parametrize("row", FIRST.values(), ids=FIRST.keys())
def test_one_of_every_family(row):
    found = again(row)
    assert (found.mode, found.sites, found.positions) == (row.mode, row.sites, row.positions), found.reason


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row.architecture.name for row in ROWS])
def test_every_row(row):
    if row.mode:
        found = again(row)
        assert (found.mode, found.sites, found.positions) == (row.mode, row.sites, row.positions), found.reason


def test_structures():
    def key(name: str) -> str:
        return coverage.structure_of(Architecture("timm", "", name)).key

    assert key("vit_tiny_patch16_224") == key("vit_base_patch32_384")
    assert key("vit_tiny_patch16_224") != key("vit_small_patch16_36x1_224")  # layer scale
    assert key("beit_base_patch16_224") != key("vit_relpos_small_patch16_224")
    assert "ConVit" in key("convit_tiny") or len(key("convit_tiny")) == 64


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the workers' own imports
def test_a_survey_proves_one_of_each_structure():
    names = ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "convit_tiny"]
    chosen = coverage.architectures("timm", names)
    rows = {row.architecture.name: row for row in coverage.survey(chosen)}
    assert (rows["vit_tiny_patch16_224"].mode, rows["vit_tiny_patch16_224"].proof) == ("tokens", "proved")
    assert rows["vit_tiny_patch16_384"].proof == "as vit_tiny_patch16_224"
    assert rows["vit_tiny_patch16_384"].positions == "577 -> 289"
    assert not rows["convit_tiny"].mode
    assert "no gather mends" in rows["convit_tiny"].reason
    text = coverage.document([*rows.values()], 0.5)
    assert "| convit" in text
    assert "reason 1: the blocks of ConVit" in text


def test_large_models_are_proved_with_few_blocks():
    large = Architecture("timm", "vision_transformer", "vit_large_patch16_224")
    small = coverage._shallow(large)
    assert small.depth == 2
    with torch.device("meta"):
        assert len(small.create().blocks) == 2
    assert coverage._shallow(Architecture("timm", "", "vit_tiny_patch16_224")).depth is None


def test_refusals():
    with pytest.raises(papr_fx.ArgumentError, match="library must be one of"):
        coverage.architectures("keras")
    with pytest.raises(papr_fx.ArgumentError, match="has no model or family that matches"):
        coverage.architectures("timm", ["vit_of_my_own"])
