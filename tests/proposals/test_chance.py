"""Maps by chance: they follow from the image alone, are even, and are unrelated between images and between patches."""

import pytest
import torch

from papr_fx.proposals.chance import ChanceNet, scattered, seeds


@pytest.fixture
def x():
    return torch.randn(5, 3, 12, 20, generator=torch.Generator().manual_seed(3))


def moved_square(count: int) -> torch.Tensor:
    """Grey images of 14 x 14 patches, of 4 x 4 pixels, with one bright patch each: their mean colours are all alike."""
    images = torch.zeros(count, 3, 56, 56)
    for number, image in enumerate(images):
        row, column = divmod(number % 196, 14)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1 + number // 196
    return images


def test_scores_follow_from_the_image_alone(x):
    """Whatever the batch, its order, the memory, the device's threads or the generator of random numbers."""
    net, state = ChanceNet("BCHW", (4, 4)), torch.get_rng_state()
    found = net(x)
    assert found.shape == (5, 3, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[3:4], net(x[3:4]))
    assert torch.equal(found.flip(0), net(x.flip(0)))
    assert torch.equal(found, net(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(found, torch.compile(net, fullgraph=True, backend="aot_eager")(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, net(x))
    assert len(found.unique()) == found.numel()


def test_scores_are_the_same_on_every_machine():
    """Those that Python's own whole numbers give."""
    images = torch.arange(2400).view(2, 3, 20, 20) / 800 - 1
    prime, found = 2**31 - 1, []
    for image in images:
        levels = [round(4096 * value) for value in image.flatten().tolist()]
        seed = sum(level * (place * place % 65521) for place, level in enumerate(levels)) % prime
        for number in range(1, 5):
            mixed = (48271 * seed + 69621 * number) % prime
            for _ in range(3):
                mixed = (mixed * mixed + number + seed) % prime
            found.append(mixed / prime)
    assert ChanceNet("BCHW", (10, 10))(images).flatten().tolist() == found


def test_bytes_and_wide_ranges_are_taken():
    values = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seeds(values), seeds(values.double()))
    assert len(seeds(values * 1.0e3).unique()) == 2


@pytest.mark.parametrize("z", [0.2, 0.5])
def test_patches_are_kept_evenly_and_independently(z):
    """Of images that differ by the place of one patch only."""
    images = moved_square(784)
    assert len(seeds(images).unique()) == len(images)
    scores = ChanceNet("BCHW", (4, 4))(images).flatten(1)
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(int(196 * z)).indices, 1) - int(196 * z) / 196
    variance = kept.var(unbiased=False)
    times = kept.sum(0).square().sum() / variance / len(images)
    assert 135 < float(times) < 265  # chi squared of 195 degrees of freedom: 195 +- 20
    between = (kept @ kept.T / variance / 196)[~torch.eye(len(images), dtype=torch.bool)]
    assert abs(float(between.mean())) < 1e-3
    assert float(between.std()) == pytest.approx(195**-0.5, rel=0.03)
    grid = kept.view(-1, 14, 14)
    assert abs(float((grid[:, 1:] * grid[:, :-1]).mean() / variance)) < 0.02
    assert abs(float((grid[:, :, 1:] * grid[:, :, :-1]).mean() / variance)) < 0.02


def test_clips_have_a_score_for_each_tubelet():
    clips = torch.randn(2, 3, 6, 12, 20)
    found = ChanceNet("BCTHW", (2, 4, 4))(clips)
    assert found.shape == (2, 3, 3, 5)
    assert torch.equal(found, scattered(seeds(clips), [3, 3, 5]))
    assert ChanceNet("BTCHW", (2, 4, 4))(clips.transpose(1, 2)).shape == (2, 3, 3, 5)
