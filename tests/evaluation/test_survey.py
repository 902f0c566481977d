"""The survey tells structures apart, and proves one architecture of each."""

import pytest
import torch

from papr_fx.evaluation import page, survey
from papr_fx.evaluation.zoo import Architecture, architectures

from ..versions import TIMM_ON_META


@TIMM_ON_META
def test_structures():
    def key(name: str) -> str:
        return survey.structure_of(Architecture("timm", "", name)).key

    assert key("vit_tiny_patch16_224") == key("vit_base_patch32_384")
    assert key("vit_tiny_patch16_224") != key("vit_small_patch16_36x1_224")  # layer scale
    assert key("beit_base_patch16_224") != key("vit_relpos_small_patch16_224")
    assert "ConVit" in key("convit_tiny") or len(key("convit_tiny")) == 64


@TIMM_ON_META
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the workers' own imports
def test_a_survey_proves_one_of_each_structure():
    names = ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "convit_tiny"]
    chosen = architectures("timm", names)
    rows = {row.architecture.name: row for row in survey.survey(chosen)}
    assert (rows["vit_tiny_patch16_224"].mode, rows["vit_tiny_patch16_224"].proof) == ("tokens", "proved")
    assert rows["vit_tiny_patch16_384"].proof == "as vit_tiny_patch16_224"
    assert rows["vit_tiny_patch16_384"].positions == "577 -> 289"
    assert not rows["convit_tiny"].mode
    assert "gathering cannot repair" in rows["convit_tiny"].reason
    text = page.document([*rows.values()], 0.5)
    assert "| convit" in text
    assert "reason 1: the blocks of ConVit" in text


@TIMM_ON_META
def test_large_models_are_proved_with_few_blocks():
    large = Architecture("timm", "vision_transformer", "vit_large_patch16_224")
    small = survey._shallow(large)
    assert small.depth == 2
    with torch.device("meta"):
        assert len(small.create().blocks) == 2
    assert survey._shallow(Architecture("timm", "", "vit_tiny_patch16_224")).depth is None
