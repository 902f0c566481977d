"""The gallery: its pictures show what `keep_masks` and `token_map` say, and its page shows all of them."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import to_tensor

import papr_fx
from benchmarks import gallery
from papr_fx.evaluation.models import VideoModel

from ..models import toy_proposal

DOCS = Path(__file__).parent.parent.parent / "docs"
DROPPED, COARSE = 0.15, 0.15 + 0.85 / 2  # how bright `papr_fx.cli.draw.dimmed` leaves them


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, by the names of their files."""
    found, save = {}, Figure.savefig

    def saved(figure, path, **options):
        save(figure, path, **options)
        found[Path(path).name] = figure

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


@pytest.fixture
def pruned(monkeypatch):
    """The modules that are asked what they keep, in order; with a toy proposal in place of EfficientNet-Lite0."""
    found, transform = [], papr_fx.transform

    def recorded(*given, **options):
        found.append(transform(*given, **options))
        return found[-1]

    monkeypatch.setattr(papr_fx, "transform", recorded)
    proposal = {"lite0": (toy_proposal(), "shared")}
    monkeypatch.setattr(gallery, "proposal_for", lambda statistics, name, pretrained: proposal[name])
    return found


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gallery", *map(str, options)])
    gallery.main()


def array_of(panel):
    """The photograph that a panel holds, (3, H, W)."""
    return torch.tensor(panel.get_images()[0].get_array()).permute(2, 0, 1)


def pixels_of(path, figure, panel):
    """The pixels of a panel in the file, (3, H, W)."""
    with Image.open(path) as picture:
        whole = to_tensor(picture.convert("RGB"))
    box, scale = panel.get_window_extent(), whole.shape[-1] / figure.bbox.width
    rows = [round((figure.bbox.height - edge) * scale) for edge in (box.y1, box.y0)]
    return whole[:, slice(*rows), round(box.x0 * scale) : round(box.x1 * scale)]


def brightness(drawn, photograph, grid):
    """How bright the middle of each position is, as a share of the photograph's; 0 where that is too dark to tell."""
    sides = [8 * cells for cells in grid]
    resized = [torch.nn.functional.interpolate(image[None], sides).mean((0, 1)) for image in (drawn, photograph)]
    middles = [image.unfold(0, 8, 8).unfold(1, 8, 8)[..., 2:6, 2:6].mean((2, 3)) for image in resized]
    return torch.where(middles[1] > 0.25, middles[0] / middles[1], 0)


def assert_shown(drawn, photograph, expected, tolerance=1e-3):
    """A picture shows the expected brightness of each position, wherever it can be told."""
    found = brightness(drawn, photograph, expected.shape)
    assert (found > 0).sum() > 0.2 * expected.numel()
    torch.testing.assert_close(found[found > 0], expected[found > 0], rtol=tolerance, atol=tolerance)


def levels(mask):
    return torch.where(mask, 1.0, DROPPED)


def coarse_levels(places):
    """From the number of places that each token stands for: one, four (a whole cell), or no token."""
    counts = places.flatten().clamp(min=0).bincount()[places.clamp(min=0)]
    assert 4 in counts[places >= 0]
    return torch.where(places < 0, DROPPED, torch.where(counts == 1, 1.0, COARSE))


def test_a_photograph(monkeypatch, tmp_path, capsys, figures, pruned):
    depths = {"test_vit": {"depth": 1}, "test_convnext": {"depths": (1, 1, 1, 1)}}
    monkeypatch.setattr(gallery, "image_model", lambda name, pretrained: timm.create_model(name, **depths[name]).eval())
    run(monkeypatch, tmp_path, "--only", "coffee", "--vit", "test_vit", "--convnext", "test_convnext")
    path = tmp_path / "coffee.jpg"
    assert list(tmp_path.iterdir()) == [path]
    drop, coarse, stages = pruned
    photograph = gallery.photograph("coffee", 160)
    images = (2 * photograph - 1).unsqueeze(0)  # as these two models take it
    figure = figures["coffee.jpg"]
    panels = figure.axes  # two rows of six; the first two of the second row are empty
    torch.testing.assert_close(array_of(panels[0]), photograph)
    torch.testing.assert_close(torch.tensor(panels[1].get_images()[1].get_array()), papr_fx.significance(drop, images)[0])
    expected = []
    for z in (0.5, 0.3):
        for gm in (drop, coarse):
            papr_fx.set_keep_ratio(gm, z)
        (kept,) = papr_fx.keep_masks(drop, images).values()
        expected += [levels(kept[0]), coarse_levels(papr_fx.token_map(coarse, images)[0])]
    beginnings = ("z=0.5: 50 of 10", "z=0.5: 32 of 10", "z=0.3: 30 of 10", "z=0.3: 4 of 10")
    for panel, level, beginning in zip(panels[2:6], expected, beginnings, strict=True):
        assert panel.get_title().startswith(beginning)
        assert_shown(array_of(panel), photograph, level, 0.2 if "coarse" in panel.get_title() else 1e-3)
        assert_shown(pixels_of(path, figure, panel), pixels_of(path, figure, panels[0]), level, 0.2)
    blocks = array_of(panels[5]).unfold(1, 2, 2).unfold(2, 2, 2)  # (3, 80, 80, 2, 2)
    flat = (blocks.amax((3, 4)) == blocks.amin((3, 4))).all(0)
    assert flat[expected[3].repeat_interleave(8, 0).repeat_interleave(8, 1) < 1].all()  # a coarse cell has half the resolution
    for panel, kept in zip(panels[8:12], papr_fx.keep_masks(stages, images).values(), strict=True):
        assert_shown(array_of(panel), photograph, levels(kept[0]))
    noise = papr_fx.significance(drop, 2 * torch.rand(8, 3, 160, 160, generator=torch.Generator().manual_seed(0)) - 1)
    columns, printed = noise.mean((0, 1)), capsys.readouterr().out.split("noise: ")[1].split()
    assert [int(columns.argmin()), int(columns.argmax())] == [printed.index("0.00"), printed.index("1.00")]


def test_clips(monkeypatch, tmp_path, figures, pruned):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.VideoMAEConfig(image_size=64, num_frames=4, num_labels=2, **sizes)
    model = VideoModel(transformers.VideoMAEForVideoClassification(config).eval(), ((0.5,) * 3, (0.5,) * 3))
    monkeypatch.setattr(gallery, "video_model", lambda name, pretrained: model)
    run(monkeypatch, tmp_path, "--only", *gallery.CLIPS)
    assert figures.keys() == {"animation.jpg", "moving_crop.jpg"}
    frames = gallery.clip("moving_crop", 4, 64)
    assert all(not torch.equal(*pair) for pair in pairwise(frames))
    clips, (drop, coarse) = (2 * frames - 1).unsqueeze(0), pruned
    panels = figures["moving_crop.jpg"].axes  # rows of two: frames, map, z=0.5, coarse, z=0.3, coarse
    for row, z in ((2, 0.5), (4, 0.3)):
        for gm in pruned:
            papr_fx.set_keep_ratio(gm, z)
        (kept,) = papr_fx.keep_masks(drop, clips).values()  # (1, 2, 4, 4)
        places = coarse_levels(papr_fx.token_map(coarse, clips)[0])
        for step in range(2):
            assert_shown(array_of(panels[2 * row + step]), frames[2 * step], levels(kept[0, step]))
            assert_shown(array_of(panels[2 * row + 2 + step]), frames[2 * step], places[step], 0.2)


def test_the_page_shows_every_picture():
    page = (DOCS / "gallery.md").read_text()
    shown = dict(re.findall(r"!\[([^\]]+)\]\(pictures/gallery/([^)]+)\)", page.replace("\n", " ")))
    names = {f"{name}.jpg" for name in (*gallery.PHOTOGRAPHS, *gallery.CLIPS)}
    assert sorted(shown.values()) == sorted(names)
    pictures = list((DOCS / "pictures" / "gallery").iterdir())
    assert {path.name for path in pictures} == names
    assert sum(path.stat().st_size for path in pictures) < 1_200_000
    for place in (*gallery.PHOTOGRAPHS.values(), gallery.ANIMATION):
        assert f"`{place}`" in page
        assert gallery.shipped(place).is_file()
