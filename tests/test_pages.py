"""The Markdown pages: lines wrap, links and pictures exist, and the README's GMACs are those that `report` counts."""

import re
from pathlib import Path

import pytest
import timm

import papr_fx

ROOT = Path(__file__).parent.parent
# docs/coverage.md is written by `make coverage`.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "coverage.md"),
]
LINKS = re.compile(r"\]\(([^)]+)\)")
WIDTH = 120
MODELS = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ConvNeXt-T": "convnext_tiny",
    "ConvNeXt-B": "convnext_base",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-B": "swin_base_patch4_window7_224",
}
LARGE = ("ViT-S/16", "ConvNeXt-T", "ConvNeXt-B", "Swin-T", "Swin-B")


def prose(text):
    """Its lines outside of code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()


def too_long(text):
    """Lines that should wrap: not those of a table, nor a link that cannot."""
    return [line for line in prose(text) if len(line) > WIDTH and not line.startswith("|") and " " in line.strip("-* ")]


def missing(page):
    """Relative links of a page, pictures among them, whose file or section does not exist."""
    found = []
    for target in LINKS.findall("\n".join(prose(page.read_text()))):
        if "://" in target:
            continue
        file, _, section = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists() or (section and section not in sections(linked)):
            found.append(target)
    return found


def sections(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def gains():
    """The README's table of gains: model, keep ratios, dense GMACs, GMACs with the proposal."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d./ ]+) \| ([\d.]+) \| ([\d./ ]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: (ratios.split(" / "), dense, pruned.split(" / ")) for name, ratios, dense, pruned in rows}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_wrap(page):
    assert too_long(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    assert missing(page) == []


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 95


def test_a_long_line_and_a_broken_link_are_found(tmp_path):
    long = "word " * 30
    link = "- [name](https://example.org/" + "x" * 120 + ")"
    assert too_long(f"{long}\n| {long} |\n{link}\n```sh\n{long}\n```\n") == [long]
    page = tmp_path / "page.md"
    page.write_text("# One `head`ing\n[a](#one-heading) [b](page.md#another) ![c](none.png) [d](https://example.org)\n")
    assert missing(page) == ["page.md#another", "none.png"]


def test_every_row_of_gains_is_counted():
    assert gains().keys() == MODELS.keys()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in MODELS])
def test_gmacs_of_the_readme(name):
    """The model is counted without weights, on the meta device."""
    ratios, dense, pruned = gains()[name]
    model = timm.create_model(MODELS[name]).eval().to("meta")
    gm = papr_fx.transform(model, timm.create_model("mobileone_s0"), float(ratios[0]), narrow=False, verify=False)
    assert f"{papr_fx.report(gm).dense_macs / 1e9:.2f}" == dense
    counted = []
    for z in ratios:
        papr_fx.set_keep_ratio(gm, float(z))
        counted.append(f"{papr_fx.report(gm).total_macs / 1e9:.2f}")
    assert counted == pruned
