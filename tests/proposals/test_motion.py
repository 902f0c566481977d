"""Motion as the map of clips: against loops over pixels, alone and times a proposal's map."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error
from papr_fx.video import read_video

from ..models import Shape, ToyViT, toy_proposal
from ..models.clips import ClipViT, clip_proposal, huggingface
from ..oracles import kept_by_hand
from ..passes.test_clip_pixels import swin

GRID = (3, 6, 8)
SIZE = (6, 24, 24)  # tubelets of 2 x 4 x 3


def moving_square(size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """A clip (3, T, H, W): a textured square that jumps on a textured ground, which no camera moves."""
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = size
    clip = torch.rand(3, 1, rows, columns, generator=generator, dtype=torch.float64).repeat(1, frames, 1, 1)
    square = torch.rand(3, 5, 5, generator=generator, dtype=torch.float64)
    for frame in range(frames):
        row, column = (int(torch.randint(side - 5, (), generator=generator)) for side in (rows, columns))
        clip[:, frame, row : row + 5, column : column + 5] = square
    return clip


def motion_by_hand(clip: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The mean change of the pixels of each tubelet from the frame before, for a clip (3, T, H, W) that they divide."""
    step = [side // count for side, count in zip(clip.shape[1:], grid, strict=True)]
    motion = torch.zeros(grid, dtype=clip.dtype)
    for t in range(clip.shape[1]):
        before = t - 1 if t else 1
        for row in range(clip.shape[2]):
            for column in range(clip.shape[3]):
                change = sum(abs(float(c[t, row, column] - c[before, row, column])) for c in clip) / 3
                motion[t // step[0], row // step[1], column // step[2]] += change
    return motion / (step[0] * step[1] * step[2])


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_exactly_the_tubelets_that_a_square_crosses_are_kept(prefix):
    """On (B, C, T, H, W); with a token in front the counts differ, and nothing else."""
    model = ClipViT(GRID, prefix).double().eval()
    x = torch.stack([moving_square(SIZE), moving_square(SIZE, seed=1)])
    gm = papr_fx.transform(model, None, 0.5, example_input=x, saliency="motion", verify=prefix == 0)
    for clip in x:
        expected = motion_by_hand(clip, GRID)
        psm = papr_fx.ops.pool_map(papr_fx.significance(gm, clip[None]), GRID)
        assert relative_error(psm[0], expected) < 1e-12
        crossed = expected > 0
        assert 20 < int(crossed.sum()) < 100
        papr_fx.set_keep_ratio(gm, (int(crossed.sum()) + prefix + 0.5) / (crossed.numel() + prefix))
        ((grid, mask),) = papr_fx.keep_masks(gm, clip[None]).items()
        assert grid == GRID
        assert torch.equal(mask[0], crossed) == (prefix == 0)  # z counts the token in front
        assert bool((mask[0] | ~crossed).all())
    assert papr_fx.report(gm).proposal_macs == 0
    assert papr_fx.report(gm).total_macs < papr_fx.report(gm).dense_macs


@torch.no_grad()
def test_clips_with_frames_first():
    model = huggingface("VideoMAEForVideoClassification")  # (B, T, C, H, W), tubelets of 2 x 16 x 16
    gm = papr_fx.transform(model, None, 0.5, saliency="motion", verify=False)
    clip = moving_square((6, 48, 48))
    psm = papr_fx.ops.pool_map(papr_fx.significance(gm, clip.transpose(0, 1)[None]), (3, 3, 3))
    assert relative_error(psm[0], motion_by_hand(clip, (3, 3, 3))) < 1e-12


@torch.no_grad()
def test_every_grid_of_a_hierarchical_model_has_its_own_average():
    gm = papr_fx.transform(swin(), None, 0.4, example_input=torch.zeros(1, 3, 6, 32, 48), saliency="motion", verify=False)
    noise = torch.randn(3, 6, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for clip in (moving_square((6, 32, 48)) + 1e-6 * noise, torch.cat([noise, noise[:, :2]], 1)):  # another length too
        masks = papr_fx.keep_masks(gm, clip[None])
        assert len(masks) == 2
        for grid, mask in masks.items():
            assert torch.equal(mask, kept_by_hand(motion_by_hand(clip, grid)[None], 0.4, 0))


@pytest.mark.parametrize("proposal", [clip_proposal, toy_proposal], ids=["whole clips", "each frame"])
@torch.no_grad()
def test_times_the_map_of_a_proposal(proposal):
    model = ClipViT(GRID, 0).double().eval()
    x = torch.stack([moving_square(SIZE), moving_square(SIZE, seed=1)])
    options = {"example_input": x, "proposal_size": (3, 12, 16)}
    gm = papr_fx.transform(model, proposal(), 0.5, saliency="motion*psm", **options)
    alone = papr_fx.transform(model, proposal(), 0.5, verify=False, **options)
    change = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(1)
    maps = []
    for motion, psm in zip(torch.cat([change[:, :1], change], 1), papr_fx.significance(alone, x), strict=True):
        psm = F.interpolate(psm[None, None], SIZE, mode="trilinear", align_corners=True)[0, 0]
        motion, psm = ((m - m.min()) / (m.max() - m.min()) for m in (motion, psm))
        maps.append((motion + 1e-3) * (psm + 1e-3))
    assert relative_error(papr_fx.significance(gm, x), torch.stack(maps)) < 1e-12
    (mask,) = papr_fx.keep_masks(gm, x).values()
    pooled = torch.stack(maps).unflatten(3, (8, 3)).unflatten(2, (6, 4)).unflatten(1, (3, 2)).mean((2, 4, 6))
    assert torch.equal(mask, kept_by_hand(pooled, 0.5, 0))
    found = papr_fx.report(gm)
    assert found.proposal_macs == papr_fx.report(alone).proposal_macs > 0
    assert found.per_frame == (proposal is toy_proposal)
    assert found.statistics == papr_fx.report(alone).statistics


@torch.no_grad()
def test_where_nothing_moves_the_proposal_decides():
    model = ClipViT(GRID, 0).double().eval()
    still = torch.rand(1, 3, 1, 24, 24, dtype=torch.float64).repeat(1, 1, 6, 1, 1)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=still, saliency="motion*psm", verify=False)
    psm = toy_proposal().double().eval()(still[:, :, 0]).mean(1).unflatten(2, (8, 3)).unflatten(1, (6, 4)).mean((2, 4))
    (mask,) = papr_fx.keep_masks(gm, still).values()
    best = psm.flatten().sort(descending=True).indices[: 6 * 8 // 2]
    assert torch.equal(mask.all(1).flatten().nonzero().flatten(), best.sort().values)


@pytest.mark.slow
@pytest.mark.parametrize("saliency", ["motion", "motion*psm"])
@torch.no_grad()
def test_compiled_exported_copied_and_in_half_precision(saliency):
    model = ClipViT(GRID, 1).eval()
    x = torch.randn(2, 3, *SIZE)
    proposal = clip_proposal() if "*" in saliency else None
    gm = papr_fx.transform(model, proposal, 0.5, example_input=x, saliency=saliency, verify=False)
    torch.compiler.reset()
    backend = "aot_eager" if proposal else "inductor"
    assert relative_error(torch.compile(gm, fullgraph=True, backend=backend)(x), gm(x)) < 1e-4
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert relative_error(program.module()(x.repeat(2, 1, 1, 1, 1)), gm(x).repeat(2, 1)) < 1e-5
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), gm(x))
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert not papr_fx.significance(gm, x).requires_grad
    half = papr_fx.transform(model.bfloat16(), proposal, 0.5, example_input=x.bfloat16(), saliency=saliency, verify=False)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert papr_fx.significance(half, x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "proposal", "options", "reason"),
    [
        (lambda: ToyViT(Shape()), None, {}, r"the model takes images \(1, 3, 8, 12\), no clips"),
        (lambda: ToyViT(Shape()), toy_proposal, {"saliency": "motion*psm"}, "takes images"),
        (lambda: ClipViT(GRID, 0), toy_proposal, {}, 'uses no proposal: pass proposal=None, or saliency="motion\\*psm"'),
        (lambda: ClipViT(GRID, 0), None, {"proposal_size": 12}, "proposal_size and input_stats have no effect"),
        (lambda: ClipViT(GRID, 0), None, {"input_stats": "shared"}, "proposal_size and input_stats have no effect"),
        (lambda: nn.Sequential(ClipViT((1, 6, 8), 0)), None, {"frames": 1}, r"clips \(1, 3, 1, 24, 24\) have one frame"),
        (lambda: ClipViT(GRID, 0), None, {"saliency": "motion*mean"}, 'for clips also "motion"'),
    ],
)
def test_arguments(model, proposal, options, reason):
    given = {"saliency": "motion", **options}
    built = model()
    if not isinstance(built, ToyViT):
        given["example_input"] = torch.zeros(1, 3, given.pop("frames", SIZE[0]), *SIZE[1:])
    with pytest.raises(papr_fx.ArgumentError, match=reason):
        papr_fx.transform(built, proposal and proposal(), 0.5, **given)


@pytest.mark.parametrize("saliency", ["psm", "motion*psm"])
def test_other_maps_need_a_proposal(saliency):
    with pytest.raises(papr_fx.ProposalError, match='not NoneType; only saliency="motion" does without one'):
        papr_fx.transform(ClipViT(GRID, 0), None, 0.5, example_input=torch.zeros(1, 3, *SIZE), saliency=saliency)


def test_a_clip_that_scikit_image_ships():
    """A fifth of its tubelets hold most of its change."""
    frames = read_video(Path(data.__file__).parent / "no_time_for_that_tiny.gif", frames=6)  # (6, 3, H, W)
    clip = F.interpolate(frames.double() / 255, SIZE[1:], mode="area").transpose(0, 1)
    gm = papr_fx.transform(ClipViT(GRID, 0).double(), None, 0.2, example_input=clip[None], saliency="motion", verify=False)
    (mask,) = papr_fx.keep_masks(gm, clip[None]).values()
    motion = motion_by_hand(clip, GRID)
    assert torch.equal(mask, kept_by_hand(motion[None], 0.2, 0))
    assert motion[mask[0]].sum() > 0.6 * motion.sum()
