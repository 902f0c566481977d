"""The plot of an evaluation."""

import pytest

from papr_fx.cli.plot import accuracy_figure

DENSE = {"model": "a", "z": 1.0, "r": 0, "gmacs": 4.0, "agreement": 100.0}
PRUNED = {"model": "a", "z": 0.5, "r": 0, "gmacs": 2.0, "agreement": 80.0, "random_agreement": 60.0}


def lines(rows):
    (axes,) = accuracy_figure(rows).axes
    legend = axes.get_legend()
    words = [text.get_text() for text in legend.get_texts()] if legend else []
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines], words, axes.get_ylabel()


def test_random_maps_and_the_dense_model_are_drawn():
    rows = [DENSE | {"top1": 70.0}, PRUNED | {"top1": 65.0, "random_top1": 50.0}]
    drawn, words, label = lines(rows)
    assert drawn == [([4.0, 2.0], [70.0, 65.0]), ([2.0], [50.0]), ([0, 1], [70.0, 70.0])]
    assert (words, label) == (["random map", "dense"], "top-1, %")


def test_without_classes_agreement_is_drawn():
    drawn, words, label = lines([DENSE, PRUNED])
    assert drawn == [([4.0, 2.0], [100.0, 80.0]), ([2.0], [60.0])]
    assert (words, label) == (["random map"], "agreement with the dense model, %")


@pytest.mark.parametrize("r", [8, "8:late"])
def test_merging_alone_is_not_the_dense_model(r):
    drawn, words, _ = lines([DENSE | {"r": r, "top1": 70.0}])
    assert len(drawn) == 1
    assert words == []
