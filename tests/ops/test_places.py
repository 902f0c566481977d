"""Restoring tokens to their places, against plain loops."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papr_fx import ops

from ..models.dense import fill_by_hand


@st.composite
def chosen(draw):
    """A grid, and kept cells (2, k) of it in any order."""
    grid = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    count = torch.Size(grid).numel()
    kept = draw(st.integers(1, count))
    return grid, torch.tensor([draw(st.permutations(range(count)))[:kept] for _ in range(2)])


@given(chosen())
def test_places_and_the_nearest_ones(case):
    grid, cells = case
    places = ops.map_places(cells, grid)
    filled = ops.fill_nearest(places, grid)
    mask = ops.TokenRows(grid).mask(cells)
    nearest = fill_by_hand(mask)
    for sample in range(2):
        order = cells[sample].tolist()
        for cell in range(mask[sample].numel()):
            assert places[sample, cell] == (order.index(cell) if cell in order else -1)
            assert order[filled[sample, cell]] == nearest[sample, cell]


def test_ties_go_to_the_first_cell_whatever_the_order_of_tokens():
    for cells in ([[0, 8]], [[8, 0]]):
        filled = ops.fill_nearest(ops.map_places(torch.tensor(cells), (3, 3)), (3, 3))
        assert torch.tensor(cells)[0, filled[0]].tolist() == [0, 0, 0, 0, 0, 8, 0, 8, 8]


@given(chosen(), st.sampled_from([1, 2]), st.booleans(), st.sampled_from([1, 3]))
def test_restored_values(case, axis, zero, stacked):
    grid, cells = case
    shape = [2 * stacked, 4, 4]
    shape[axis] = cells.shape[1]
    value = torch.randn(shape)
    places = ops.map_places(cells, grid)
    index = places if zero else ops.fill_nearest(places, grid)
    restored = ops.restore_places(value, index, axis, zero=zero, stacked=stacked)
    for stack, sample, cell in product(range(stacked), range(2), range(places.shape[1])):
        token, row = int(index[sample, cell]), 2 * stack + sample
        wanted = value[row].select(axis - 1, token) if token >= 0 else torch.zeros(4)
        assert torch.equal(restored[row].select(axis - 1, cell), wanted)


@pytest.mark.parametrize("zero", [False, True])
def test_an_empty_batch(zero):
    places = ops.map_places(torch.zeros((0, 2), dtype=torch.int64), (2, 3))
    restored = ops.restore_places(torch.zeros(0, 2, 4), ops.fill_nearest(places, (2, 3)), 1, zero=zero)
    assert restored.shape == (0, 6, 4)
