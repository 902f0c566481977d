"""The functions that graphs call, against loops and sorts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papr_fx.ops import gather_tokens, keep_count, pixel_rows, resize_map, top_positions, write_pixels
from papr_fx.ops.positions import _looked_up


@pytest.mark.parametrize(
    ("positions", "z", "prefix", "kept"),
    [
        (196, 0.5, 1, 98),
        (196, 0.45, 1, 88),
        (196, 0.001, 1, 1),
        (196, 0.999, 1, 196),
        (4, 0.99, 5, 4),
        (3136, 0.65, 0, 2038),
        (1, 0.1, 0, 1),
    ],
)
def test_keep_count(positions, z, prefix, kept):
    assert keep_count(positions, z, prefix) == kept


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.floats(0.01, 1), st.integers(0, 99))
def test_top_positions_are_the_largest(batch, rows, columns, prefix, z, seed):
    psm = torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = top_positions(psm, z, prefix)
    k = min(rows * columns, max(1, math.floor((rows * columns + prefix) * z)))
    for sample, chosen in zip(psm, keep.tolist(), strict=True):
        scores = sample.flatten().tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        assert chosen[:prefix] == list(range(prefix))
        assert sorted(chosen[prefix:]) == sorted(i + prefix for i in best)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.data())
def test_gather_tokens_is_a_loop_over_samples(batch, count, width, data):
    tokens = torch.randn(batch, width, count, dtype=torch.float64).transpose(1, 2)  # not contiguous
    k = data.draw(st.integers(1, count))
    keep = torch.stack([torch.randperm(count)[:k] for _ in range(batch)])
    expected = torch.stack([torch.stack([tokens[b, i] for i in keep[b].tolist()]) for b in range(batch)])
    assert torch.equal(gather_tokens(tokens, keep), expected)


def test_resize_map_keeps_corners_and_orientation():
    corners = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    psm = resize_map(corners, (3, 7))
    assert psm.shape == (1, 3, 7)
    assert torch.allclose(psm[0][[0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([1.0, 2.0, 3.0, 5.0]), atol=1e-6, rtol=0)
    assert resize_map(corners.half(), (3, 7)).dtype == torch.float32


@pytest.mark.parametrize("background", ["keep", "zero"])
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_looking_branches_up_equals_writing_them(background, batch, rows, columns, width, data):
    residual = torch.randn(batch, rows * columns, width, dtype=torch.float64)
    k = data.draw(st.integers(1, rows * columns))
    keep = torch.stack([torch.randperm(rows * columns)[:k] for _ in range(batch)])
    branch = torch.randn(batch, k, width, dtype=torch.float64)
    index = pixel_rows(keep, (rows, columns))
    written = write_pixels(residual, branch, index, "BNC", background)
    looked_up = _looked_up(residual.flatten(0, 1), branch.flatten(0, 1), index, background)
    assert torch.equal(written.flatten(0, 1), looked_up)
