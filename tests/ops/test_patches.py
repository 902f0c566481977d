"""Embedding of kept patches, against PyTorch's convolution of the whole image."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papr_fx.ops import embed_patches, embed_quads, quad_grid, quad_members

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


@settings(max_examples=30, deadline=None)
@given(
    grid=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    suffix=st.integers(0, 2),
    data=st.data(),
)
def test_kept_patches_and_quads_are_those_of_two_convolutions(grid, suffix, data):
    patch = (1, 2, 3)[-len(grid) :]
    kind = nn.Conv2d if len(grid) == 2 else nn.Conv3d
    conv = kind(2, 5, patch, patch).double()
    sides = [count * pixels for count, pixels in zip(grid, patch, strict=True)]
    members = quad_members(grid, torch.zeros(1))
    cells, quads = torch.tensor(grid).prod().item(), torch.tensor(quad_grid(grid)).prod().item()
    x = torch.randn(2, 2, *sides, dtype=torch.float64)
    of_quads = torch.randn(2, quads, 2, *patch, dtype=torch.float64)
    halved = torch.zeros_like(x)
    for number, quad in enumerate(members.tolist()):
        for cell in quad:
            place = torch.unravel_index(torch.tensor(cell), grid)
            where = [slice(int(i) * pixels, (int(i) + 1) * pixels) for i, pixels in zip(place, patch, strict=True)]
            halved[(slice(None), slice(None), *where)] = of_quads[:, number]
    fine = data.draw(st.integers(0, cells))
    coarse = data.draw(st.integers(0 if fine else 1, quads))
    rows = [torch.cat([torch.randperm(cells)[:fine], cells + suffix + torch.randperm(quads)[:coarse]]) for _ in range(2)]

    first, second = embed_quads(x, torch.stack(rows), conv, halved, members, suffix)

    patches, copies = conv(x), conv(halved)
    assert first.shape == second.shape == patches.shape
    for sample, kept in enumerate(rows):
        of_patches = kept[kept < cells]
        torch.testing.assert_close(first.flatten(2)[sample][:, of_patches], patches.flatten(2)[sample][:, of_patches])
        places = members[kept[kept >= cells] - cells - suffix].flatten()
        torch.testing.assert_close(second.flatten(2)[sample][:, places], copies.flatten(2)[sample][:, places])
        assert (first[sample] != 0).any()
        assert (second[sample] != 0).any()


def test_a_watched_convolution_is_called_for_both():
    conv = nn.Conv2d(3, 4, 2, 2)
    x, halved, keep = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([[0, 4]])
    conv.register_forward_hook(lambda *_: None)
    first, second = embed_quads(x, keep, conv, halved, quad_members((2, 2), x))
    assert torch.equal(first, conv(x))
    assert torch.equal(second, conv(halved))
