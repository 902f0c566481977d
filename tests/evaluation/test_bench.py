"""Timing candidates, and from which batch on they are faster than the dense model."""

from dataclasses import replace

import pytest
import torch

from papr_fx.evaluation.bench import Comparison, TimingSettings, benchmark, candidates
from papr_fx.evaluation.bench_rows import Row, break_even

from ..models import Shape, ToyViT, toy_proposal

ROW = Row("m", "papr z=0.5", "eager", 1, 224, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 2.0)


@pytest.mark.parametrize(
    ("speeds", "expected"), [({1: 0.9, 8: 1.1, 32: 1.5}, 8), ({1: 1.2, 8: 0.9, 32: 1.1}, 32), ({1: 1.2, 8: 0.9}, None)]
)
def test_break_even(speeds, expected):
    rows = [replace(ROW, infer_batch_size=size, speed_up=speed) for size, speed in speeds.items()]
    rows.append(replace(ROW, variant="dense"))
    assert break_even(rows) == {("m", "papr z=0.5", "eager"): expected}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_autocast():
    x = torch.zeros(1, 3, *Shape().image)
    chosen = candidates(ToyViT(Shape()).eval(), toy_proposal(), x, Comparison([0.5]))
    settings = TimingSettings([2], compiled=True, autocast=torch.bfloat16, rounds=2, warmup=1)
    rows = benchmark("toy", chosen, x, settings)
    assert [row.run for row in rows] == ["compiled"] * 3
    assert max(row.speed_up for row in rows[:2]) == 1.0
    assert all(row.infer_step_time_low <= row.infer_step_time <= row.infer_step_time_high for row in rows)
