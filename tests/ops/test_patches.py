"""Embedding of kept patches, against PyTorch's convolution of the whole image."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papr_fx.ops import embed_patches

SIZES = st.integers(1, 3)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.lists(SIZES, min_size=2, max_size=3),
    patch=st.lists(SIZES, min_size=3, max_size=3),
    bias=st.booleans(),
    data=st.data(),
)
def test_kept_patches_are_those_of_a_convolution(grid, patch, bias, data):
    patch = patch[: len(grid)]
    kind = nn.Conv2d if len(grid) == 2 else nn.Conv3d
    conv = kind(2, 5, tuple(patch), tuple(patch), bias=bias).double()
    left_over = [data.draw(st.integers(0, pixels - 1)) for pixels in patch]
    sides = [count * pixels + more for count, pixels, more in zip(grid, patch, left_over, strict=True)]
    x = torch.randn(2, 2, *sides, dtype=torch.float64)
    cells = torch.tensor(grid).prod().item()
    keep = torch.stack([torch.randperm(cells)[: max(1, cells // 2)] for _ in range(2)])

    found = embed_patches(x, keep, conv)

    expected = conv(x).flatten(2)
    assert found.shape == conv(x).shape
    for sample in range(2):
        for cell in range(cells):
            value = found.flatten(2)[sample, :, cell]
            if cell in keep[sample]:
                torch.testing.assert_close(value, expected[sample, :, cell])
            else:  # a kept one: no zeros, at which derivatives may be infinite
                torch.testing.assert_close(value, expected[sample, :, keep[sample, 0]])


def test_gradients_are_those_of_the_kept_patches():
    conv = nn.Conv2d(3, 4, 2, 2).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[0, 5], [3, 1]])
    mask = torch.zeros(2, 6, dtype=torch.float64).scatter(1, keep, 1).view(2, 1, 2, 3)
    weights = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((conv(x) * mask * weights).sum(), (x, conv.weight, conv.bias))
    found = torch.autograd.grad((embed_patches(x, keep, conv) * mask * weights).sum(), (x, conv.weight, conv.bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolution_that_is_watched_is_called():
    conv = nn.Conv2d(3, 4, 2, 2)
    x, keep = torch.randn(2, 3, 4, 6), torch.tensor([[0, 5], [3, 1]])
    seen = []
    handle = conv.register_forward_hook(lambda _m, _a, out: seen.append(out))
    assert torch.equal(embed_patches(x, keep, conv), conv(x))
    handle.remove()
    conv.forward = lambda _x: seen[0] * 2
    assert torch.equal(embed_patches(x, keep, conv), seen[0] * 2)
    del conv.forward
    assert not torch.equal(embed_patches(x, keep, conv), conv(x))
    conv.dilation = (1, 2)  # replaced by another one, or changed
    conv.padding = (0, 1)
    assert torch.equal(embed_patches(x, keep, conv), conv(x))
