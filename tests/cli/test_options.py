"""The options of the command line: how their text is read."""

import argparse

import pytest

import papr_fx
from papr_fx.cli.options import merge_of, merging


@pytest.mark.parametrize(
    ("text", "merge"),
    [
        ("8", papr_fx.Merge(8)),
        ("8:late", papr_fx.Merge(8, schedule="late")),
        ("8:share", papr_fx.Merge(8, schedule="share")),
        ("4,4,8,8", papr_fx.Merge([4, 4, 8, 8])),
    ],
)
def test_what_merge_takes(text, merge):
    assert merge_of(merging(text)) == merge
    assert merge.words == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "must be at least 1"),
        ("0,0", "must be at least 1"),
        ("-1", "0 or more"),
        ("a", "must be a whole number, not 'a'"),
        ("4,", "must be a whole number, not ''"),
        ("8:early", "schedule must be one of 'constant', 'late', 'share'"),
        ("8:", "schedule must be one of"),
        ("4,8:late", "spreads one r"),
    ],
)
def test_what_merge_refuses(text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        merging(text)
