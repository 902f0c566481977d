"""Counting the right answers of a model's variants, on one process."""

import time

import pytest
import torch

import papr_fx
from papr_fx.evaluation.counts import Counts
from papr_fx.evaluation.decoders import ImageDecoder
from papr_fx.evaluation.evaluate import DataError, RunSettings, evaluate
from papr_fx.evaluation.runner import Runner
from papr_fx.evaluation.samples import Samples


class Fixed(torch.utils.data.Dataset):
    """Samples of one number each, the class that the model ranks first; a negative label means that there is no class."""

    def __init__(self, *labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor([float(index % 3)]), self.labels[index], index, ""


def one_hot(x):
    return torch.nn.functional.one_hot(x[:, 0].long(), 10).float() + torch.arange(10) / 100


def test_samples_without_a_class_are_no_mistakes():
    found = evaluate({"a": Runner(one_hot)}, Fixed(0, 1, -1, -1, 2), RunSettings("a", workers=0, batch_size=2))
    assert (found.total, found.counts["a"]) == (5, Counts(3, 2, 2, 5, 0, 0, found.counts["a"].seconds))
    none = evaluate({"a": Runner(one_hot)}, Fixed(-1, -1), RunSettings("a", workers=0))
    assert (none.total, none.counts["a"].labelled, none.counts["a"].top1) == (2, 0, 0)


def test_reassessed_labels():
    labels = {0: (0, 5), 1: (), 2: (1,), 3: (0,)}
    found = evaluate({"a": Runner(one_hot)}, Fixed(9, 9, 9, 9), RunSettings("a", workers=0, real_labels=labels.__getitem__))
    assert (found.counts["a"].real, found.counts["a"].real_total, found.counts["a"].top1) == (2, 3, 0)
    assert found.counts["a"].top5 == 4  # class 9 comes second


def test_each_shape_is_run_once_untimed(monkeypatch):
    shapes = []

    def slow_at_first(x):
        time.sleep(0.0 if len(x) in shapes else 0.2)
        shapes.append(len(x))
        return one_hot(x)

    found = evaluate({"a": Runner(slow_at_first)}, Fixed(*range(8)), RunSettings("a", workers=0, batch_size=3))
    assert shapes == [3, 3, 3, 2, 2]
    assert found.counts["a"].seconds < 0.2


class Reader(list):
    def filename(self, index, *_):
        return f"{index}.png"


def test_labels_beyond_the_model_are_refused():
    with pytest.raises(papr_fx.ArgumentError, match="class 7, but the model has 4 classes"):
        evaluate({"1": Runner(lambda x: torch.zeros(len(x), 4))}, Fixed(7, 7), RunSettings("1", workers=0))


def test_strict_names_the_file(tmp_path):
    bad = tmp_path / "a.png"
    bad.write_bytes(b"")
    data = Samples(Reader([(bad.open("rb"), 0)]), ImageDecoder(lambda image: torch.zeros(3, 2, 2)), (3, 2, 2))
    with pytest.raises(DataError, match="0.png"):
        evaluate({"1": Runner(lambda x: x)}, data, RunSettings("1", workers=0, strict=True))
