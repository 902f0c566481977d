"""`TokenRows` against plain Python."""

import pytest
import torch

from papr_fx.ops import TokenRows

CELLS = torch.tensor([[4, 0, 5], [1, 2, 3]])


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_cells_and_indices(prefix):
    rows = TokenRows((2, 3), prefix)
    assert (rows.cells, rows.count) == (6, 6 + prefix)
    index = rows.index(CELLS)
    assert index.tolist() == [[*range(prefix), *(cell + prefix for cell in sample)] for sample in CELLS.tolist()]
    assert torch.equal(rows.cells_of(index), CELLS)


@pytest.mark.parametrize(
    ("grid", "prefix", "z", "kept"),
    [((14, 14), 1, 0.5, 99), ((14, 14), 0, 0.5, 98), ((14, 14), 5, 1.0, 201), ((2, 2), 1, 0.01, 2), ((2, 2, 2), 0, 0.25, 2)],
)
def test_kept_rows(grid, prefix, z, kept):
    assert TokenRows(grid, prefix).kept(z) == kept


def test_masks_and_restored_grids():
    rows = TokenRows((2, 3), 1)
    mask = rows.mask(CELLS)
    patches = torch.arange(24.0).view(2, 3, 4)
    restored = rows.restore(patches, CELLS, torch.tensor(-1.0))
    assert restored.shape == (2, 4, 2, 3)
    for sample in range(2):
        for cell in range(6):
            row, column = divmod(cell, 3)
            kept = cell in CELLS[sample].tolist()
            assert bool(mask[sample, row, column]) == kept
            wanted = patches[sample, CELLS[sample].tolist().index(cell)] if kept else torch.full((4,), -1.0)
            assert torch.equal(restored[sample, :, row, column], wanted)


def test_a_vector_fills_dropped_places():
    restored = TokenRows((1, 2)).restore(torch.ones(1, 1, 3), torch.tensor([[1]]), torch.tensor([2.0, 3.0, 4.0]))
    assert restored[0, :, 0].T.tolist() == [[2, 3, 4], [1, 1, 1]]
