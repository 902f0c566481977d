"""Random models against their oracles, and the oracles against planted faults."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.random_models.__main__ import run
from benchmarks.random_models.draw import build, draw
from benchmarks.random_models.judge import judge
from benchmarks.random_models.records import read, rows_of, table
from benchmarks.random_models.shrink import as_code, shrink
from benchmarks.random_models.spec import Spec
from papr_fx.ops import gather_positions, gather_tokens, halve_quads, match_tokens, restore_places, write_pixels

CHUNK = 20
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_models_are_refused_or_equal_their_oracles(first):
    results = {number: judge(draw(number)) for number in range(first, first + CHUNK)}
    wrong = {number: result for number, result in results.items() if result.verdict in ("finding", "broken", "needless")}
    assert not wrong
    assert sum(result.verdict == "equal" for result in results.values()) >= 3


@pytest.mark.slow
def test_two_processes_judge_models(tmp_path):
    command = [sys.executable, "-m", "benchmarks.random_models", "--count", "3", "--workers", "2", "--out", tmp_path / "a.json"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert sorted(line["number"] for line in read(tmp_path / "a.json")) == [0, 1, 2]


def rolled_gather(tokens, keep):
    return gather_tokens(tokens, keep.roll(1, 0))


def rolled_table(value, keep, *rest):
    return gather_positions(value, keep.flip(1), *rest)


def kept_background(residual, branch, rows, layout, background):
    return write_pixels(residual, branch, rows, layout, "keep")


def whole_images(images, grid, patch):
    return halve_quads(images, grid, patch).flip(-1)


def other_pairs(keys, *rest):
    return match_tokens(-(keys.flip(1) ** 2), *rest)


def shifted_places(value, places, *rest, **options):
    return restore_places(value, places.roll(1, 1), *rest, **options)


FAULTS = {
    "papr_fx.passes.prune_tokens.gather_tokens": (rolled_gather, Spec()),
    "papr_fx.passes.gather_positions.gather_positions": (rolled_table, Spec(inner="bias")),
    "papr_fx.passes.prune_pixels.write_pixels": (kept_background, Spec(trunk="conv", grid=(4, 5))),
    "papr_fx.passes.coarsen_background.halve_quads": (whole_images, Spec(background="coarse", grid=(4, 4))),
    "papr_fx.passes.merge_tokens.match_tokens": (other_pairs, Spec(merge=2, grid=(4, 4), z=0.75)),
    "papr_fx.passes.restore_places.restore_places": (shifted_places, Spec(head="dense")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_oracle_sees_a_planted_fault(name, monkeypatch):
    fault, spec = FAULTS[name]
    spec = replace(spec, verify=False, narrow=False)
    assert judge(spec).verdict == "equal"
    monkeypatch.setattr(name, fault)
    result = judge(spec, strict=True)
    assert result.verdict == "finding"
    assert result.reason == "differs"
    assert result.error > 1e-3


def test_a_trap_that_is_accepted_is_a_finding(monkeypatch):
    spec = Spec(traps=("Mixer:between",), verify=False)
    assert judge(replace(spec, verify=True)).verdict == "refused"
    assert judge(replace(Spec(), verify=False, traps=("MeanAdded:between",))).verdict == "unjudged"
    monkeypatch.setattr("benchmarks.random_models.mixing.Mixer.forward", lambda self, x: x + x.mean(1, keepdim=True))
    result = judge(spec, strict=True)
    assert result.verdict == "finding"
    assert result.reason == "accepted: Mixer"


def test_a_number_gives_the_same_model_every_time():
    for number in (3, 14, 25):
        spec = draw(number)
        state = torch.get_rng_state()
        one, other = build(spec), build(draw(number))
        assert torch.equal(state, torch.get_rng_state())
        assert spec == draw(number)
        assert torch.equal(one.images, other.images)
        pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert judge(spec) == judge(draw(number))


def test_what_fails_is_shrunk_to_the_smallest_model(monkeypatch):
    monkeypatch.setattr("papr_fx.passes.gather_positions.gather_positions", rolled_table)
    spec = Spec(inner="bias", mlp="gated", body="named", traps=("Dropped:inside",), suffix=1, verify=False)
    smallest = shrink(spec, judge(spec))
    assert smallest == Spec(inner="bias", verify=False)
    assert "Spec(inner='bias', verify=False)" in as_code(smallest)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    run(range(2), out, workers=1)
    lines = read(out)
    assert [line["number"] for line in lines] == [0, 1]
    monkeypatch.setattr("benchmarks.random_models.__main__.judged", lambda number: {**lines[0], "number": number})
    run(range(3), out, workers=1)
    assert [line["number"] for line in read(out)] == [0, 1, 2]
    assert rows_of(read(out))[-1][:2] == ["all", 3]
    assert "equal to the oracle" in table(read(out))
