"""A batch that does not fit into memory is run in smaller parts."""

import pytest
import torch

from papr_fx.evaluation.runner import Runner


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
