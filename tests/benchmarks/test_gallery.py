"""The gallery: its pictures show what `keep_masks` and `token_map` say, and its page shows all of them."""

import re
import sys
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
from papr_fx.proposals.named import LITE0_STATISTICS, lite0

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
    sides = [(8 * cells, 8 * cells) for cells in grid][:1] * 2
    resized = [torch.nn.functional.interpolate(image[None], sides[0]).mean((0, 1)) for image in (drawn, photograph)]
    middles = [image.unfold(0, 8, 8).unfold(1, 8, 8)[..., 2:6, 2:6].mean((2, 3)) for image in resized]
    return torch.where(middles[1] > 0.25, middles[0] / middles[1], 0)


def assert_shown(drawn, photograph, expected, tolerance=1e-3):
    """A picture shows the expected brightness of each position, wherever it can be told."""
    found = brightness(drawn, photograph, expected.shape)
    assert (found > 0).sum() > 0.2 * expected.numel()
    torch.testing.assert_close(found[found > 0], expected[found > 0], rtol=tolerance, atol=tolerance)


def pruned(model, example, statistics, background="auto"):
    stats = (statistics, LITE0_STATISTICS)
    return papr_fx.transform(
        model, lite0(), 0.5, example_input=example, background=background, input_stats=stats, verify=False
    )


def levels(mask):
    return torch.where(mask, 1.0, DROPPED)


def coarse_levels(places):
    """From the number of places that each token stands for: one, four (a whole cell), or no token."""
    counts = places.flatten().clamp(min=0).bincount()[places.clamp(min=0)]
    assert set(counts[places >= 0].tolist()) == {1, 4}
    return torch.where(places < 0, DROPPED, torch.where(counts == 1, 1.0, COARSE))


def test_a_photograph(monkeypatch, tmp_path, figures):
    options = ("--only", "coffee", "--vit", "test_vit", "--convnext", "test_convnext")
    run(monkeypatch, tmp_path, *options)
    path = tmp_path / "coffee.jpg"
    assert list(tmp_path.iterdir()) == [path]
    figure = figures["coffee.jpg"]
    panels = figure.axes  # two rows of six; the first two of the second row are empty
    photograph = gallery.photograph("coffee", 160)
    torch.testing.assert_close(array_of(panels[0]), photograph)
    vit, convnext = timm.create_model("test_vit").eval(), timm.create_model("test_convnext").eval()
    half, images = ((0.5,) * 3, (0.5,) * 3), (2 * photograph - 1).unsqueeze(0)  # as test_vit has it
    drop, coarse = (pruned(vit, images, half, background) for background in ("auto", "coarse"))
    torch.testing.assert_close(torch.tensor(panels[1].get_images()[1].get_array()), papr_fx.significance(drop, images)[0])
    expected = []
    for z in (0.5, 0.3):
        for gm in (drop, coarse):
            papr_fx.set_keep_ratio(gm, z)
        (kept,) = papr_fx.keep_masks(drop, images).values()
        expected += [levels(kept[0]), coarse_levels(papr_fx.token_map(coarse, images)[0])]
    assert [int((level == 1).sum()) for level in expected] == [50, 32, 30, 4]
    beginnings = ("z=0.5: 50 of 10", "z=0.5: 32 of 10", "z=0.3: 30 of 10", "z=0.3: 4 of 10")
    for panel, level, beginning in zip(panels[2:6], expected, beginnings, strict=True):
        assert panel.get_title().startswith(beginning)
        assert_shown(array_of(panel), photograph, level, 0.2 if "coarse" in panel.get_title() else 1e-3)
        assert_shown(pixels_of(path, figure, panel), pixels_of(path, figure, panels[0]), level, 0.15)
    blocks = array_of(panels[5]).unfold(1, 2, 2).unfold(2, 2, 2)  # (3, 80, 80, 2, 2)
    flat = (blocks.amax((3, 4)) == blocks.amin((3, 4))).all(0)
    assert flat[expected[3].repeat_interleave(8, 0).repeat_interleave(8, 1) < 1].all()  # a coarse cell has half the resolution
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    stages = papr_fx.keep_masks(pruned(convnext, images, half), images).values()
    del imagenet
    for panel, kept in zip(panels[8:12], stages, strict=True):
        assert_shown(array_of(panel), photograph, levels(kept[0]))


def test_clips(monkeypatch, tmp_path, figures):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.VideoMAEConfig(image_size=64, num_frames=4, num_labels=2, **sizes)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    transformers.VideoMAEImageProcessor().save_pretrained(tmp_path / "model")
    run(monkeypatch, tmp_path / "out", "--only", *gallery.CLIPS, "--video", tmp_path / "model")
    assert figures.keys() == {"animation.jpg", "moving_crop.jpg"}
    frames = gallery.clip("moving_crop", 4, 64)
    assert all(not torch.equal(*pair) for pair in zip(frames[:-1], frames[1:], strict=True))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in imagenet)
    clips = ((frames - mean) / std).unsqueeze(0)
    (kept,) = papr_fx.keep_masks(pruned(model, clips, imagenet), clips).values()  # (1, 2, 4, 4)
    places = papr_fx.token_map(pruned(model, clips, imagenet, "coarse"), clips)
    panels = figures["moving_crop.jpg"].axes  # rows of two: frames, map, z=0.5, coarse, z=0.3, coarse
    for step in range(2):
        assert_shown(array_of(panels[4 + step]), frames[2 * step], levels(kept[0, step]))
        assert_shown(array_of(panels[6 + step]), frames[2 * step], coarse_levels(places[0])[step], 0.2)
    for panel in panels[4::2]:  # a label is no longer than its panel is high
        assert panel.yaxis.label.get_window_extent().height <= panel.get_window_extent().height


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
