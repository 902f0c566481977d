"""Quads of patches against counts by hand and plain loops."""

from itertools import product
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papr_fx import ops

from ..coarse_by_hand import chosen_by_hand, quads_by_hand
from ..oracles import count_by_hand

grids = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
)


@pytest.mark.parametrize(
    ("grid", "k", "fine", "coarse"),
    [
        ((14, 14), 98, 16, 33),  # 64 + 33 = 97 tokens
        ((14, 14), 59, 3, 46),  # 12 + 46 = 58
        ((14, 14), 49, 0, 49),
        ((14, 14), 39, 0, 39),
        ((16, 16), 128, 21, 43),  # 84 + 43 = 127
        ((16, 16), 77, 4, 60),
        ((16, 16), 51, 0, 51),
        ((3, 3), 6, 0, 4),  # one quad of four patches, two of two, one of one
        ((3, 3), 7, 1, 3),
        ((3, 3), 8, 1, 3),
        ((1, 5), 4, 0, 3),  # none of four
        ((2, 3, 4), 13, 1, 7),  # 3 frames would be 3 rows of quads; here (2, 2, 2) quads, four of them whole
        ((8, 14, 14), 784, 130, 262),
    ],
)
def test_counts_by_hand(grid, k, fine, coarse):
    assert ops.quad_counts(grid, k) == (fine, coarse)
    assert ops.quad_counts(grid, k).tokens <= k


@given(grids)
def test_members_are_those_of_a_loop(grid):
    members = ops.quad_members(grid, torch.zeros(()))
    expected = quads_by_hand(grid)
    assert len(members) == len(expected)
    for found, wanted in zip(members.tolist(), expected, strict=True):
        assert sorted(found) == sorted(wanted * (4 // len(wanted)))  # each as often


@given(grids, st.floats(0.01, 1), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))
def test_the_best_quads_stay_fine(grid, z, prefix, suffix, seed):
    psm = torch.rand(2, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = psm[0].numel()
    keep = ops.choose_quads(psm, z, prefix, suffix)
    for sample, rows in zip(psm, keep.tolist(), strict=True):
        fine, coarse = chosen_by_hand(sample.flatten().tolist(), grid, z, prefix + suffix)
        k = count_by_hand(count, z, prefix + suffix)
        first, last = list(range(prefix)), list(range(prefix + count, prefix + count + suffix))
        assert rows == first + [prefix + i for i in fine] + [prefix + count + suffix + q for q in coarse] + last
        assert len(fine) + len(coarse) == ops.quad_counts(grid, k).tokens <= k


def test_a_choice_by_hand():
    psm = torch.tensor([[[0.0, 0, 9, 9, 1], [0, 0, 9, 8, 1], [1, 1, 1, 1, 50]]])  # quads: 0, 35/4, 1; 1, 1, 50
    assert ops.choose_quads(psm, 0.7, 1).tolist() == [[0, 3, 4, 8, 9, 16, 18, 19, 20, 21]]  # k = 11: the 50 is one patch
    assert ops.choose_quads(psm, 0.15, 1).tolist() == [[0, 17, 21]]  # k = 2


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_patch_holds_its_quad_at_half_size(grid, height, width, seed):
    rows, columns = grid
    images = torch.randn(
        2, 3, rows * height, columns * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    halved = ops.halve_quads(images, grid, (height, width))
    for r, c in product(range(rows), range(columns)):
        top, left = r // 2 * 2 * height, c // 2 * 2 * width
        quad = images[:, :, top : top + 2 * height, left : left + 2 * width]
        small = torch.nn.functional.adaptive_avg_pool2d(quad, (height, width))
        assert torch.allclose(halved[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width], small, atol=1e-12)


def test_whole_numbers_are_rounded_and_padded_patches_read_the_last_line():
    images = torch.tensor([[[[0, 1], [2, 4]]]], dtype=torch.uint8)
    halved = ops.halve_quads(images, (2, 2), (1, 1))
    assert halved.dtype == torch.uint8
    assert (halved == 2).all()  # 1.75
    short = ops.halve_quads(torch.arange(3.0).view(1, 1, 1, 3), (1, 2), (1, 2))  # the fourth column is padding of the model
    assert short.tolist() == [[[[0.5, 2.0, 0.5]]]]


@given(grids, st.integers(0, 2), st.integers(0, 2), st.integers(0, 9))
def test_quads_follow_the_tokens(grid, prefix, suffix, seed):
    quads = quads_by_hand(grid)
    members = ops.quad_members(grid, torch.zeros(()))
    generator = torch.Generator().manual_seed(seed)
    count = prefix + sum(map(len, quads)) + suffix
    tokens, halved = torch.randn(2, 2, count, 3, generator=generator, dtype=torch.float64)
    joined = ops.join_quads(tokens, halved, members, prefix)
    assert torch.equal(joined[:, :count], tokens)  # to the bit
    means = torch.stack([halved[:, [prefix + i for i in quad]].mean(1) for quad in quads], 1)
    assert torch.allclose(joined[:, count:], means, atol=1e-12)


@given(grids, st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 9))
def test_tables_hold_the_mean_over_a_quad(grid, first, behind, left_out, seed):
    quads = [[first + i for i in quad] for quad in quads_by_hand(grid)]
    count = first + sum(map(len, quads)) + behind
    table = torch.randn(2, count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    members = ops.quad_members(grid, table)
    rows = ops.add_quads(table[0], members, [2], 4, (first, left_out))
    assert rows.shape == (1, 1, count + left_out + len(quads), count)
    pairs = ops.add_quads(table, members, [2, 3], 4, (first, left_out))
    assert torch.equal(pairs[0, :, :count, :count], table)
    start = count + left_out
    for q, quad in enumerate(quads):
        assert torch.allclose(rows[0, 0, start + q], table[0, quad].mean(0), atol=1e-12)
        assert torch.allclose(pairs[0, :, start + q, :count], table[:, quad].mean(1), atol=1e-12)
        for p, other in enumerate(quads):
            assert torch.allclose(pairs[0, :, start + q, start + p], table[:, quad][:, :, other].mean((1, 2)), atol=1e-12)


@given(grids, st.floats(0.01, 1), st.integers(0, 2), st.integers(0, 2), st.integers(0, 9))
def test_places_of_tokens(grid, z, prefix, suffix, seed):
    psm = torch.rand(2, *grid, generator=torch.Generator().manual_seed(seed))
    count, quads = psm[0].numel(), quads_by_hand(grid)
    for keep in (ops.choose_quads(psm, z, prefix, suffix), ops.top_positions(psm, z, prefix, suffix)):
        rows = ops.TokenRows(grid, prefix, suffix)
        places = rows.places(rows.cells_of(keep))
        expected = torch.full((2, count), -1)
        for sample, kept in enumerate(keep.tolist()):
            for place, row in enumerate(kept[prefix : len(kept) - suffix]):
                number = row - prefix
                if number < count:
                    expected[sample, number] = place
                else:
                    expected[sample, quads[number - count - suffix]] = place
        assert torch.equal(places, expected.view(2, *grid))
        fine = torch.zeros_like(places, dtype=torch.bool).flatten(1)
        for sample, kept in enumerate(keep.tolist()):
            fine[sample, [row - prefix for row in kept if prefix <= row < prefix + count]] = True
        assert torch.equal(rows.mask(rows.cells_of(keep)), fine.view(2, *grid))


def test_empty_batches():
    keep = ops.choose_quads(torch.zeros(0, 4, 6), 0.5, 1)
    assert keep.shape == (0, 1 + ceil(6) + 4 * 2 - 2)
    assert ops.token_places(keep[:, 1:], (4, 6)).shape == (0, 24)
