"""From video files to the views that a model takes."""

import torch

from papr_fx.evaluation.decoders import ClipDecoder, Views

from ..labelled_clips import MEAN, STD, WORDS, views_of


def test_views(labelled_clips):
    decode = ClipDecoder(4, 32, (MEAN, STD), Views(temporal=2, spatial=2, step=2))
    for number in (0, 2):
        path = labelled_clips / "kinetics" / "val" / WORDS[number % 3] / f"{number}.mp4"
        with path.open("rb") as source:
            found = decode(source)
        assert found.shape == (4, 4, 3, 32, 32)
        torch.testing.assert_close(found, views_of(path), rtol=0, atol=1e-5)
