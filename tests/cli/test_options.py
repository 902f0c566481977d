"""The options of the command line: how their text is read."""

import argparse
import ast

import pytest
import torch

import papr_fx
from papr_fx.choose import KeepRatio
from papr_fx.cli import tune
from papr_fx.cli.main import main
from papr_fx.cli.options import merge_of, merging
from papr_fx.evaluation.subject import ModelSpec, image_subject


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


def test_model_kwargs(monkeypatch):
    found = []
    monkeypatch.setattr(tune, "choose_keep_ratio", lambda model, *_, **__: found.append(model) or KeepRatio(1, [(1, 1)]))
    given = ["tune", "--gmacs", "1", "--model", "vit_tiny_patch16_224", "--proposal", "test_resnet", "--model-kwargs"]
    assert main([*given, "depth=1", "img_size=64", "num_classes=3", "global_pool=avg"]) == 0
    (model,) = found
    assert (len(model.blocks), model.num_classes, model.global_pool, model.patch_embed.img_size) == (1, 3, "avg", (64, 64))


def test_model_kwargs_that_a_model_does_not_take(capsys):
    given = ["tune", "--gmacs", "1", "--model"]
    assert main([*given, "vit_tiny_patch16_224", "--model-kwargs", "deep=1"]) == 2
    assert "unexpected keyword argument 'deep'" in capsys.readouterr().err
    for option, value in (("--model-kwargs", "depth=1"), ("--num-classes", "3")):
        assert main([*given, "videomae_base", option, value]) == 2
        assert f"{option} is for models of timm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["depth:6"], "argument --model-kwargs: must be NAME=VALUE, such as depth=6, not depth:6"),
        (["depth=6", "folder"], "must be NAME=VALUE, such as depth=6, not depth=6 folder"),
        (["pretrained=True"], "pretrained is no further option of timm.create_model here"),
    ],
)
def test_model_kwargs_that_are_refused(given, said, capsys):
    try:
        status = main(["tune", "--gmacs", "1", "--model", "vit_tiny_patch16_224", "--model-kwargs", *given])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("size", "shape"), [("64", (3, 64, 64)), ("(64,48)", (3, 64, 48))])
def test_images_are_as_large_as_the_model_was_made_for(size, shape):
    spec = ModelSpec("vit_tiny_patch16_224", torch.device("meta"), options={"img_size": ast.literal_eval(size), "depth": 1})
    assert image_subject(spec).shape == shape
