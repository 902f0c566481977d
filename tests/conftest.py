"""Settings of the suite: one thread a worker, repeatable hypothesis runs, `--accept` for golden files."""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

from .labelled import save, write_checkpoints
from .labelled_clips import write_clips
from .versions import LEFT_OUT, WARNINGS

EXAMPLES = {"quick": 20, "all": 100}  # of each property
for name, count in EXAMPLES.items():
    settings.register_profile(
        name, deadline=None, derandomize=True, max_examples=count, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
torch.set_num_threads(1)
collect_ignore = list(LEFT_OUT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the golden files, all of them")
    parser.addoption("--all", action="store_true", help="run slow sweeps too, and all cases of tests that are sampled")


def pytest_report_header() -> list[str]:
    return [f"left out: {file}: {why}" for file, why in LEFT_OUT.items()]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--accept"):
        os.environ["PAPR_FX_ACCEPT"] = "1"
    settings.load_profile("all" if config.getoption("--all") else "quick")
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.getoption("--accept"):
        return
    slow = {item for item in items if item.get_closest_marker("slow")}
    cases: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if (mark := item.get_closest_marker("one_in")) and item not in slow:
            cases.setdefault((item.nodeid.partition("[")[0], mark.args[0]), []).append(item)
    left = slow.union(*({*found} - {*sampled(found, n)} for (_, n), found in cases.items()))
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def sampled(items: list[pytest.Item], n: int) -> list[pytest.Item]:
    """One in n of them, the same in each run; not every n-th, which might leave out a whole value of some parameter."""
    return random.Random(len(items)).sample(items, -(-len(items) // n))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """41 images in 7 classes, and checkpoints of the networks."""
    root = tmp_path_factory.mktemp("images")
    for i in range(41):
        save(root / "validation" / f"class{i % 7}" / f"{i:02d}.png", i)
    write_checkpoints(root)
    return root


@pytest.fixture(scope="session")
def labelled_clips(tmp_path_factory):
    """Seven videos in three classes, two of them short and one unreadable, and a small VideoMAE."""
    root = tmp_path_factory.mktemp("clips")
    write_clips(root)
    return root


@pytest.fixture
def damaged(tmp_path):
    """20 images in 7 classes, three of them unreadable, and checkpoints of the networks."""
    root = tmp_path / "damaged"
    for i in range(20):
        save(root / "validation" / f"class{i % 7}" / f"{i:02d}.png", i)
    for name in ("class6/06.png", "class5/19.png"):
        (root / "validation" / name).write_bytes(b"no image")
    whole = (root / "validation" / "class5" / "12.png").read_bytes()
    (root / "validation" / "class5" / "12.png").write_bytes(whole[: len(whole) // 2])
    write_checkpoints(root)
    return root
