"""`python -m benchmarks.gpu --dry-run`: every part with tiny models on a CPU, and a second run that goes on where one stopped.

The runs are processes of their own, as a user starts them; one for all tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks.gpu import plan
from benchmarks.gpu.child import Child
from benchmarks.gpu.estimates import Estimate, beside, estimates
from benchmarks.gpu.jobs import CORRECTNESS, ESTIMATES, KERNELS, PARTS, SPEED, TRAINING, Job
from benchmarks.gpu.pool import Pool, Settings
from benchmarks.gpu.results import Results
from benchmarks.gpu.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]
KEPT = "kept from before"
FAILING = plan.timed("no such model", "graphs", 2, ("dense",), tiny=True)


def run(out, *options):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(
    scope="module",
    params=[pytest.param(part, marks=pytest.mark.slow) for part in ("check and speed of a ViT", "all but one")],
    ids=str,
)
def walked(tmp_path_factory, request):
    """The folder of a dry run in which some tasks were done already, what it printed, and the tasks it had to do."""
    out = tmp_path_factory.mktemp("gpu")
    tasks = plan.tiny()
    todo = tasks[:-1] if request.param == "all but one" else [tasks[0], tasks[2]]
    kept = [
        {"task": task.name, "part": task.part, "subject": "ViT-B", "variant": KEPT, "run": "", "batch": 0} for task in tasks
    ]
    kept = [row for row in kept if row["task"] not in {task.name for task in todo}]
    names = [row["task"] for row in kept]
    kept.append({"task": todo[0].name, "part": CORRECTNESS, "check": KEPT})  # in part only: it is done again
    failed = {"task": todo[0].name, "what": "float32", "why": "of an earlier run"}
    (out / "gpu.json").write_text(json.dumps({"rows": kept, "errors": [failed], "done": names}))
    done = run(out)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    return out, done.stdout, todo


@pytest.fixture(scope="module")
def rows(walked):
    return json.loads((walked[0] / "gpu.json").read_text())["rows"]


def test_every_part_is_walked_through(walked, rows):
    assert {row["part"] for row in rows} == set(PARTS)
    kept = json.loads((walked[0] / "gpu.json").read_text())
    assert (kept["errors"], kept["left for want of time"]) == ([], [])
    assert kept["environment"]["torch"]
    assert {row["task"] for row in rows if row["part"] != ESTIMATES} == {task.name for task in plan.tiny()}
    assert sorted(path.name for path in walked[0].iterdir()) == ["gpu.json", "log.txt", "summary.md"]


def test_what_an_earlier_run_found_is_not_done_again(walked, rows):
    todo = {task.name for task in walked[2]}
    for task in plan.tiny():
        variants = [row.get("variant") for row in rows if row["task"] == task.name]
        assert (variants == [KEPT]) == (task.name not in todo)


def test_variants_are_timed_beside_the_dense_model(walked, rows):
    timed = [task for task in walked[2] if task.timed]
    assert timed
    for task in timed:
        own = {row["variant"]: row for row in rows if row["task"] == task.name and row["part"] == task.part}
        assert list(own) == [job.what for job in task.jobs]
        dense = min(row["ms"] for what, row in own.items() if what.startswith("dense"))
        for what, row in own.items():
            assert row["speed-up"] == pytest.approx(dense / row["ms"])
            assert row["samples"] == 2
            assert (row["MAC ratio"] is None) == what.startswith("dense")
        pruned = own[task.jobs[-1].what]
        assert pruned["of it"] == pytest.approx(pruned["speed-up"] / pruned["MAC ratio"])


def test_the_dearest_kernels_are_recorded(rows):
    found = [row for row in rows if row["part"] == KERNELS]
    assert {row["variant"] for row in found} > {"dense"}
    for row in found:
        times = [kernel["ms"] for kernel in row["kernels"]]
        assert 3 < len(times) <= 10
        assert times == sorted(times, reverse=True)


def test_estimates_stand_beside_measurements(rows):
    (row,) = [row for row in rows if row["part"] == ESTIMATES]
    assert (row["subject"], row["variant"], row["estimated ms dense"]) == ("ViT-B", "mobileone_s0 224", 7.34)
    measured = next(r for r in rows if r["part"] == SPEED and r["variant"] == row["variant"])
    assert row["speed-up"] == measured["speed-up"]


def test_the_summary_has_all_parts(walked):
    text = (walked[0] / "summary.md").read_text()
    assert text.count("\n## ") == len(PARTS)
    assert "Nothing failed." in text
    assert all(line in walked[1] for line in text.splitlines())


def test_checks_in_float32(rows):
    told = [row for row in rows if row["task"] == plan.tiny()[0].name]
    checks = [row["check"].removeprefix("float32: ") for row in told]
    assert checks == [
        "proof on the device",
        "eager does not wait",
        "rounding beside float64",
        "device beside CPU",
        "graphs beside eager",
        "compiled beside eager",
    ]
    assert all(row["ok"] for row in told)
    assert 0 < told[2]["error"] < 1e-5


def work(folder, tasks, **settings):
    """Rows and failures of tasks that run in this process's own pool."""
    told, failed, done = [], [], []
    options = {"slots": 2, "end": time.monotonic() + 300, "log": folder / "log.txt", "context": "forkserver", "rounds": 1}
    pool = Pool(
        Settings(**options | settings),
        lambda _, row: told.append(row),
        lambda _, what, why: failed.append((what, why)),
        done.append,
    )
    left = pool.run(tasks)
    assert not left or "end" in settings
    assert (not done) == bool(failed)
    return told, failed


def test_a_failure_is_told_with_its_reason(tmp_path):
    told, failed = work(tmp_path, [FAILING])
    assert not told
    ((what, why),) = failed
    assert what == "dense"
    assert why.endswith("KeyError: 'no such model'")


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    slow = plan.Task("slow", plan.tiny()[1].jobs, 0.5)
    told, failed = work(tmp_path, [slow])
    assert (told, failed) == ([], [("recompilations", "timed out after 0 s")])


def test_what_there_is_no_time_for_is_left(tmp_path):
    tasks = plan.tiny()
    pool = Pool(Settings(2, time.monotonic() - 1, tmp_path / "log.txt"), *[lambda *_: None] * 3)
    assert pool.run(tasks) == tasks


def sleep_in_own_group(connection):
    os.setpgrp()
    connection.send(("ready", {}))
    time.sleep(60)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_is_stopped_and_goes_on():
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=sleep_in_own_group, args=(there,))
    process.start()
    child = Child(Job(SPEED, "ViT-B", "dense"), process, here, time.monotonic() + 5, 5)
    assert child.working
    assert child.take() == "ready"
    assert child.ready
    child.stop()
    until(lambda: state_of(process.pid) == "T")
    before = child.deadline
    child.go_on(7.0)
    until(lambda: state_of(process.pid) != "T")
    assert child.deadline == before + 7
    child.end()
    assert process.exitcode == -signal.SIGKILL
    assert not child.ready


def until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_failures_of_an_earlier_run_are_tried_again_last(tmp_path):
    tasks = plan.tiny()
    names = [task.name for task in tasks]
    results = Results(tmp_path, rows=[{"task": names[2]}], errors=[{"task": names[0]}, {"task": names[1]}], done=[names[1]])
    assert results.to_do(tasks) == [*tasks[2:], tasks[0]]  # of the third only a part is done
    assert results.errors == [{"task": names[1]}]


def test_rows_of_an_earlier_run_are_replaced(tmp_path):
    first, second = plan.tiny()[:2]
    results = Results(tmp_path, rows=[{"task": task.name, "check": KEPT} for task in (first, second)])
    for check in ("a", "b"):
        results.tell(first, {"check": check})
    assert [row["check"] for row in results.rows] == [KEPT, "a", "b"]
    results.complete(first)
    assert Results.open(tmp_path, results.path).to_do([first, second]) == [second]


def test_estimates_are_those_of_the_page(tmp_path):
    page = estimates(None)
    assert Estimate("ViT-B", "lcnet_035 160", 7.34, 3.87) in page
    assert {estimate.subject for estimate in page} == {"ViT-B", "ConvNeXt-B", "Swin-B"}
    row = {"model": "convnext_base", "proposal": "mobileone_s0 160", "ms dense": 10.0, "ms pruned": 8.0}
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps({"rows": [row]}))
    found = estimates(path)
    assert found == [Estimate("ConvNeXt-B", "mobileone_s0 160", 10.0, 8.0)]
    row = {"part": SPEED, "subject": "ConvNeXt-B", "run": "graphs", "batch": 128, "ms": 5.0, "speed-up": 1.0}
    rows = [row | {"variant": "dense"}, row | {"variant": "mobileone_s0 160", "ms": 4.0, "speed-up": 1.25}]
    (told,) = beside(rows, found, 128)
    assert (told["estimated speed-up"], told["speed-up"]) == (1.25, 1.25)
    assert beside(rows, found, 32) == []
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="--estimates: no row"):
        estimates(path)


def test_the_plan_names_models_and_tasks_once():
    tasks = plan.whole()
    assert len({task.name for task in tasks}) == len(tasks)
    assert {job.subject for task in tasks for job in task.jobs} == set(SUBJECTS)
    assert all(task.jobs[0].what.startswith("dense") for task in tasks if task.timed)
    assert {task.part for task in tasks} == {CORRECTNESS, SPEED, TRAINING}
