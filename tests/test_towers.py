"""YOLOS, whose detection tokens stand behind the patches, and a pruned tower inside LLaVA: against transcriptions by hand."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from .models import enliven, toy_proposal
from .oracles import count_by_hand
from .versions import MODULES_OF_TRANSFORMERS_5

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
DETECTIONS = 5


def picked(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, K) of tokens (B, N, C), or of one table for all (1, N, C)."""
    return torch.stack([sample[index] for sample, index in zip(tokens.expand(len(rows), -1, -1), rows, strict=True)])


@MODULES_OF_TRANSFORMERS_5
@pytest.mark.parametrize("between", [False, True])
@torch.no_grad()
def test_yolos(between):
    config = transformers.YolosConfig(
        **SMALL,
        num_hidden_layers=2,
        image_size=[48, 64],
        patch_size=8,
        num_detection_tokens=DETECTIONS,
        num_labels=3,
        use_mid_position_embeddings=between,
    )
    model = enliven(transformers.YolosForObjectDetection(config)).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    out = gm(pixel_values=x)
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    assert mask.shape == (2, 6, 8)
    assert mask.flatten(1).sum(1).tolist() == [count_by_hand(48, 0.5, 1 + DETECTIONS)] * 2
    ends = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, DETECTIONS, dtype=torch.bool)
    rows = torch.stack([row.nonzero()[:, 0] for row in torch.cat([ends[0], mask.flatten(1), ends[1]], dim=1)])
    tokens = picked(model.vit.embeddings(x), rows)
    for number, block in enumerate(model.vit.encoder.layer):
        tokens = block(tokens)
        if between and not number:
            tokens = tokens + picked(model.vit.encoder.interpolation((48, 64))[0], rows)
    tokens = model.vit.layernorm(tokens)
    assert relative_error(out.last_hidden_state, tokens) < 1e-12
    assert relative_error(out.logits, model.class_labels_classifier(tokens[:, -DETECTIONS:])) < 1e-12
    assert relative_error(out.pred_boxes, model.bbox_predictor(tokens[:, -DETECTIONS:]).sigmoid()) < 1e-12
    grid = papr_fx.restore_grid(gm, out.last_hidden_state, x).permute(0, 2, 3, 1)
    assert relative_error(grid[mask], tokens[:, 1:-DETECTIONS].flatten(0, 1)) < 1e-12
    assert not grid[~mask].any()
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(pixel_values=x).logits, model(pixel_values=x).logits)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SMALL, num_hidden_layers=2, image_size=32, patch_size=8)
    text = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, num_hidden_layers=1, vocab_size=50)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)
    return enliven(transformers.LlavaForConditionalGeneration(config)).double().eval()


def text_with(places: int) -> Tensor:
    return torch.tensor([[1, 2, *[49] * places, 3, 4]] * 2)


@MODULES_OF_TRANSFORMERS_5
@torch.no_grad()
def test_a_pruned_tower_in_llava():
    """The code of docs/models.md, as it stands."""
    model = llava()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dense = model(input_ids=text_with(16), pixel_values=x).logits
    tower = model.model.vision_tower
    first, rest = tower.encoder.layers[0], tower.encoder.layers[1:]
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if "vision_tower" in c]
    known: dict[str, object] = {"llava": model, "proposal": toy_proposal()}
    exec(code, known)
    pruned, places = known["pruned"], known["places"]
    assert isinstance(pruned, papr_fx.planning.module.PrunedModule)
    assert places == count_by_hand(16, 0.5, 1)
    assert len(rest) == 1  # the last block, whose result LLaVA does not read

    out = model(input_ids=text_with(places), pixel_values=x)
    ((_, mask),) = papr_fx.keep_masks(pruned, x).items()
    kept = torch.stack([row.flatten().nonzero()[:, 0] + 1 for row in mask])
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept], dim=1)
    tokens = first(picked(tower.pre_layrnorm(tower.embeddings(x)), rows), None)[:, 1:]
    features = model.model.multi_modal_projector(tokens)
    assert relative_error(out.image_hidden_states, features.flatten(0, 1)) < 1e-12
    words = model.get_input_embeddings()(text_with(places))
    words = torch.cat([words[:, :2], features, words[:, -2:]], dim=1)
    expected = model.lm_head(model.model.language_model(inputs_embeds=words).last_hidden_state)
    assert relative_error(out.logits, expected) < 1e-12

    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 32"):
        model(input_ids=text_with(16), pixel_values=x)
    papr_fx.set_keep_ratio(pruned, 1.0)
    assert torch.equal(model(input_ids=text_with(16), pixel_values=x).logits, dense)


@MODULES_OF_TRANSFORMERS_5
@torch.no_grad()
def test_the_hidden_state_that_llava_asks_for_is_refused_with_the_way_out():
    model = llava()
    model.model.vision_tower = papr_fx.transform(model.model.vision_tower, toy_proposal(), 0.5, verify=False)
    with pytest.raises(papr_fx.ArgumentError, match="`output_hidden_states` is None or False, not -2.*docs/models.md"):
        model(input_ids=text_with(8), pixel_values=torch.randn(2, 3, 32, 32, dtype=torch.float64))
