"""Counting what variants of a model find: in one process, batch by batch."""

import time

import pytest
import torch

import papr_fx
from papr_fx.evaluation.evaluate import Counts, DataError, Runner, evaluate
from papr_fx.evaluation.readers import ImageDecoder, Samples


class Fixed(torch.utils.data.Dataset):
    """Samples of one number each, which is what the model returns; the last class is none."""

    def __init__(self, *labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor([float(index % 3)]), self.labels[index], index, ""


def one_hot(x):
    return torch.nn.functional.one_hot(x[:, 0].long(), 10).float() + torch.arange(10) / 100


def test_samples_without_a_class_are_no_mistakes():
    found = evaluate({"a": Runner(one_hot)}, Fixed(0, 1, -1, -1, 2), dense="a", workers=0, batch_size=2)
    assert (found.total, found.counts["a"]) == (5, Counts(3, 2, 2, 5, 0, 0, found.counts["a"].seconds))
    none = evaluate({"a": Runner(one_hot)}, Fixed(-1, -1), dense="a", workers=0)
    assert (none.total, none.counts["a"].labelled, none.counts["a"].top1) == (2, 0, 0)


def test_reassessed_labels():
    labels = {0: (0, 5), 1: (), 2: (1,), 3: (0,)}
    found = evaluate({"a": Runner(one_hot)}, Fixed(9, 9, 9, 9), dense="a", workers=0, real_labels=labels.__getitem__)
    assert (found.counts["a"].real, found.counts["a"].real_total, found.counts["a"].top1) == (2, 3, 0)
    assert found.counts["a"].top5 == 4  # class 9 comes second


def test_each_shape_is_run_once_untimed(monkeypatch):
    shapes = []

    def slow_at_first(x):
        time.sleep(0.0 if len(x) in shapes else 0.2)
        shapes.append(len(x))
        return one_hot(x)

    found = evaluate({"a": Runner(slow_at_first)}, Fixed(*range(8)), dense="a", workers=0, batch_size=3)
    assert shapes == [3, 3, 3, 2, 2]
    assert found.counts["a"].seconds < 0.2


def test_batches_are_halved_where_memory_is_short():
    calls = []

    def small(x):
        calls.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return x * 2

    runner = Runner(small)
    x = torch.arange(10.0).unsqueeze(1)
    assert torch.equal(runner(x), x * 2)
    assert calls == [10, 8, 4, 2, 2, 2, 2, 2]
    calls.clear()
    assert torch.equal(runner(x[:5]), x[:5] * 2)
    assert calls == [2, 2, 1]  # it stays so

    def at_once(x):
        if len(x) > 5:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return x

    views = torch.rand(4, 3, 2)
    assert torch.equal(Runner(at_once, views=True)(views), views.softmax(-1).mean(1))

    def broken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Runner(broken)(x)

    def never(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Runner(never)(x)


class Reader(list):
    def filename(self, index, *_):
        return f"{index}.png"


def test_labels_beyond_the_model_are_refused():
    with pytest.raises(papr_fx.ArgumentError, match="class 7, but the model tells 4 apart"):
        evaluate({"1": Runner(lambda x: torch.zeros(len(x), 4))}, Fixed(7, 7), dense="1", workers=0)


def test_strict_names_the_file(tmp_path):
    bad = tmp_path / "a.png"
    bad.write_bytes(b"")
    data = Samples(Reader([(bad.open("rb"), 0)]), ImageDecoder(lambda image: torch.zeros(3, 2, 2)), (3, 2, 2))
    with pytest.raises(DataError, match="0.png"):
        evaluate({"1": Runner(lambda x: x)}, data, dense="1", workers=0, strict=True)
