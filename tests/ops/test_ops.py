"""The functions that rewritten graphs call, against plain Python: decimals, loops and sorts."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papr_fx import ops
from papr_fx.ops.positions import _looked_up
from papr_fx.tracing.numerics import relative_error

from ..oracles import count_by_hand

ratios = st.floats(0.001, 1)


def some_positions(batch: int, positions: int, count: int) -> torch.Tensor:
    """`count` different positions for each sample, in any order: (B, count)."""
    return torch.stack([torch.randperm(positions)[:count] for _ in range(batch)])


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
    assert ops.keep_count(positions, z, prefix) == kept


@given(st.integers(1, 4096), ratios, st.integers(0, 5))
def test_keep_count_rounds_down(positions, z, prefix):
    assert ops.keep_count(positions, z, prefix) == count_by_hand(positions, z, prefix)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), ratios, st.integers(0, 99))
def test_top_positions_are_the_largest(batch, rows, columns, prefix, z, seed):
    psm = torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = ops.top_positions(psm, z, prefix)
    k = count_by_hand(rows * columns, z, prefix)
    for sample, chosen in zip(psm, keep.tolist(), strict=True):
        scores = sample.flatten().tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        assert chosen[:prefix] == list(range(prefix))
        assert sorted(chosen[prefix:]) == sorted(i + prefix for i in best)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.data())
def test_gather_tokens_is_a_loop_over_samples(batch, count, width, data):
    tokens = torch.randn(batch, width, count, dtype=torch.float64).transpose(1, 2)  # not contiguous
    keep = some_positions(batch, count, data.draw(st.integers(1, count)))
    expected = torch.stack([torch.stack([tokens[b, i] for i in keep[b].tolist()]) for b in range(batch)])
    assert torch.equal(ops.gather_tokens(tokens, keep), expected)


def test_gathered_positions_against_loops():
    keep = torch.tensor([[3, 0], [1, 2]])
    table, bias, own = torch.randn(4, 5), torch.randn(1, 3, 4, 4), torch.randn(2, 4, 5)
    rows = ops.gather_positions(table, keep, [2], 4)
    pairs = ops.gather_positions(bias, keep, [2, 3], 4)
    batched = ops.gather_positions(own, keep, [1], 3)
    assert (rows.shape, pairs.shape, batched.shape) == ((2, 1, 2, 5), (2, 3, 2, 2), (2, 2, 5))
    for image, cells in enumerate(keep.tolist()):
        for i, a in enumerate(cells):
            assert torch.equal(rows[image, 0, i], table[a])
            assert torch.equal(batched[image, i], own[image, a])
            for j, b in enumerate(cells):
                assert torch.equal(pairs[image, :, i, j], bias[0, :, a, b])


@pytest.mark.parametrize("grid", [(3, 4, 2), (4, 5, 3), (6, 8, 10)], ids=["divides", "does not", "as it is"])
def test_pool_map_averages_over_cells(grid):
    """Where sizes are no multiples, cells share pixels: each goes from the floor of an edge to the ceiling of the next."""
    maps = torch.rand(2, 6, 8, 10, dtype=torch.float64)
    found = ops.pool_map(maps, grid)
    assert found.shape == (2, *grid)
    for cell in itertools.product(*map(range, grid)):
        edges = [(i * side // n, -(-(i + 1) * side // n)) for i, side, n in zip(cell, maps.shape[1:], grid, strict=True)]
        (a, b), (c, d), (e, f) = edges
        assert torch.allclose(found[(slice(None), *cell)], maps[:, a:b, c:d, e:f].mean((1, 2, 3)), rtol=0, atol=1e-14)
    assert ops.pool_map(maps.half(), grid).dtype == torch.float32
    assert torch.allclose(ops.pool_map(maps[:, 0], grid[1:]), ops.pool_map(maps[:, :1], (1, *grid[1:]))[:, 0])  # of images


def test_resize_map_keeps_corners_and_orientation():
    corners = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    psm = ops.resize_map(corners, (3, 7))
    assert psm.shape == (1, 3, 7)
    assert torch.allclose(psm[0][[0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([1.0, 2.0, 3.0, 5.0]), atol=1e-6, rtol=0)
    assert ops.resize_map(corners.half(), (3, 7)).dtype == torch.float32


def weights_by_hand(size: int, target: int, *, cubic: bool) -> torch.Tensor:
    """Weights (target, size) of linear or cubic interpolation along one axis, with aligned corners."""
    weights = torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        place = i * (size - 1) / (target - 1) if target > 1 else 0.0
        for tap in range(int(place) - 1, int(place) + 3):
            weight = cubic_kernel(place - tap) if cubic else max(0.0, 1 - abs(place - tap))
            weights[i, min(max(tap, 0), size - 1)] += weight  # the edges repeat
    return weights


def cubic_kernel(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


@given(st.tuples(*[st.integers(1, 7)] * 2), st.tuples(*[st.integers(1, 7)] * 2))
def test_images_are_resized_bicubically(size, grid):
    maps = torch.randn(2, *size, dtype=torch.float64)
    rows, columns = (weights_by_hand(a, b, cubic=True) for a, b in zip(size, grid, strict=True))
    assert relative_error(ops.resize_map(maps, grid), rows @ maps @ columns.T) < 1e-12


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
def test_clips_are_resized_trilinearly(size, grid):
    maps = torch.randn(2, *size, dtype=torch.float64)
    weights = [weights_by_hand(a, b, cubic=False) for a, b in zip(size, grid, strict=True)]
    expected = torch.einsum("bthw,Tt,Hh,Ww->bTHW", maps, *weights)
    assert relative_error(ops.resize_map(maps, grid), expected) < 1e-12


def test_ops_against_loops():
    x = torch.randn(2, 5, 3, 4)
    keep = torch.tensor([[1, 11, 6], [0, 2, 9]])
    rows = ops.pixel_rows(keep, (3, 4))
    picked = ops.gather_pixels(x, rows, (3, 4), "BCHW")  # (2, 5, 3, 1)
    for image in range(2):
        for place, cell in enumerate(keep[image].tolist()):
            assert torch.equal(picked[image, :, place, 0], x[image, :, cell // 4, cell % 4])
    written = ops.write_pixels(x, picked, rows, "BCHW", "zero")
    expected = torch.zeros_like(x)
    for image in range(2):
        for cell in keep[image].tolist():
            expected[image, :, cell // 4, cell % 4] = 2 * x[image, :, cell // 4, cell % 4]
    assert torch.equal(written, expected)
    kept = ops.write_pixels(x, picked, rows, "BCHW", "keep")
    assert torch.equal(kept, torch.where(expected != 0, expected, x))
    last = ops.gather_pixels(x.permute(0, 2, 3, 1), rows, (3, 4), "BHWC")
    assert torch.equal(last, picked.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="chosen for a grid"):
        ops.gather_pixels(x, rows, (4, 3), "BCHW")


def written_by_loops(residual: torch.Tensor, branch: torch.Tensor, keep: torch.Tensor, background: str) -> torch.Tensor:
    """(B, N, C) and (B, k, C): kept positions are residual + branch, the others the residual or zero."""
    out = [[row.tolist() if background == "keep" else [0.0] * len(row) for row in sample] for sample in residual]
    for b, cells in enumerate(keep.tolist()):
        for place, cell in enumerate(cells):
            out[b][cell] = [x + y for x, y in zip(residual[b, cell].tolist(), branch[b, place].tolist(), strict=True)]
    return torch.tensor(out, dtype=residual.dtype)


@pytest.mark.parametrize("background", ["keep", "zero"])
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_looking_branches_up_equals_writing_them(background, batch, rows, columns, width, data):
    """Eager mode writes each branch to its position; on CUDA each position looks up its branch instead."""
    residual = torch.randn(batch, rows * columns, width, dtype=torch.float64)
    keep = some_positions(batch, rows * columns, data.draw(st.integers(1, rows * columns)))
    branch = torch.randn(batch, keep.shape[1], width, dtype=torch.float64)
    index = ops.pixel_rows(keep, (rows, columns))
    expected = written_by_loops(residual, branch, keep, background)
    assert torch.equal(ops.write_pixels(residual, branch, index, "BNC", background), expected)
    looked_up = _looked_up(residual.flatten(0, 1), branch.flatten(0, 1), index, background)
    assert torch.equal(looked_up, expected.flatten(0, 1))


@settings(max_examples=15)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from(["BCHW", "BHWC"]), st.data())
def test_moved_cells_are_found_by_their_numbers(grid, layout, data):
    keep = some_positions(2, prod(grid), data.draw(st.integers(1, prod(grid))))
    cells = ops.number_cells(keep, grid, layout)
    assert cells.shape == ((1, 1, *grid) if layout == "BCHW" else (1, *grid, 1))
    assert cells.flatten().tolist() == list(range(prod(grid)))
    order = data.draw(st.permutations(range(prod(grid))))
    moved = ops.moved_cells(keep, torch.tensor(order).view(cells.shape))
    assert moved.tolist() == [[order.index(cell) for cell in sample] for sample in keep.tolist()]


@pytest.mark.parametrize("layout", ["BCHW", "BHWC", "BNC", "BCN", "BCTHW", "BTHWC"])
def test_masks_multiply_positions(layout):
    grid = (2, 3, 4) if "T" in layout else (3, 4)
    mask = torch.randint(0, 2, (2, prod(grid)))
    x = torch.randn(2, 5, *grid)
    expected = x.clone()
    for b in range(2):
        for cell in range(prod(grid)):
            expected.flatten(2)[b, :, cell] *= mask[b, cell]
    if "N" in layout:
        x, expected = x.flatten(2), expected.flatten(2)
    if layout[-1] == "C":
        x, expected = x.movedim(1, -1), expected.movedim(1, -1)
    assert torch.equal(ops.mask_positions(x, mask, layout, grid), expected)


@pytest.mark.parametrize(("positions", "z", "kept"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.999, 999), (196, 0.1, 19)])
def test_a_keep_ratio_is_the_decimal_that_it_is_written_as(positions, z, kept):
    assert ops.keep_count(positions, z) == kept


def test_kept_positions_ascend():
    keep = ops.top_positions(torch.randn(4, 6, 7), 0.5, 2)
    assert torch.equal(keep, keep.sort(dim=1).values)
    compiled = torch.compile(ops.top_positions, fullgraph=True, backend="aot_eager")
    psm = torch.randn(4, 6, 7)
    assert torch.equal(compiled(psm, 0.29, 2), ops.top_positions(psm, 0.29, 2))
