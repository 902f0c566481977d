"""Prompts that blocks put among their tokens and take away again."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal
from ..proof.parts import case_of, failures
from .test_tokens_behind import MORE, SHAPE, kept_rows


class Prompted(Block):
    """Adds prompts to its tokens and takes them away again; `where` says how."""

    def __init__(self, where: str, fused: bool = True) -> None:
        super().__init__(8, Attention(8, 2, fused))
        self.where = where
        self.prompts = nn.Parameter(torch.zeros(1, MORE, 8))

    def forward(self, x: Tensor) -> Tensor:
        prompts, count = self.prompts.expand(x.shape[0], -1, -1), x.shape[1]
        if self.where == "second":
            x = super().forward(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
            return torch.cat([x[:, :1], x[:, 1 + MORE :]], dim=1)
        put = (lambda parts: torch.concatenate(parts, axis=1)) if self.where == "axis" else (lambda parts: torch.cat(parts, 1))
        x = super().forward(put([x[:,], prompts]))
        return x[:, :count] if self.where == "count" else x[:, :-MORE]


@pytest.mark.parametrize(("where", "fused"), [("second", True), ("count", False), ("end", True), ("axis", True)])
@torch.no_grad()
def test_prompts_inside_a_block(where, fused):
    model = ToyViT(SHAPE)
    model.blocks = nn.ModuleList([Prompted(where, fused)])
    enliven(model).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)  # `hidden keys` follows the longer sequence
    x = images(SHAPE, 2)
    rows = kept_rows(gm, x, suffix=0)
    kept = torch.stack([sample[index] for sample, index in zip(model.tokens(x), rows, strict=True)])
    assert relative_error(gm(x), model.classify(model.blocks[0](kept))) < 1e-12


class Forgetful(Prompted):
    """Reads the mean of its tokens too, which no attention hides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


def test_hidden_keys_finds_what_is_mixed_beside_prompts():
    model = ToyViT(SHAPE)
    model.blocks = nn.ModuleList([Forgetful("end")])
    assert "hidden keys" in failures(case_of(enliven(model)))


class DeepPrompts(ToyViT):
    """The model's own loop adds prompts before each block, and takes as many tokens as there were."""

    def __init__(self, constant: int = 0) -> None:
        super().__init__(Shape())
        self.prompts = nn.Parameter(torch.zeros(2, 1, MORE, 8))
        self.constant = constant
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        count = self.constant or x.shape[1]  # read before tokens are dropped
        for block, prompts in zip(self.blocks, self.prompts, strict=True):
            x = block(torch.cat([x, prompts.expand(x.shape[0], -1, -1)], dim=1))[:, :count]
        return self.classify(x)


@torch.no_grad()
def test_deep_prompts():
    model = DeepPrompts().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = images(SHAPE, 2)
    rows = kept_rows(gm, x, suffix=0)
    tokens = torch.stack([sample[index] for sample, index in zip(model.tokens(x), rows, strict=True)])
    for block, prompts in zip(model.blocks, model.prompts, strict=True):
        tokens = block(torch.cat([tokens, prompts.expand(2, -1, -1)], dim=1))[:, :-MORE]
    assert relative_error(gm(x), model.classify(tokens)) < 1e-12


def test_a_constant_number_of_tokens_is_refused():
    with pytest.raises(papr_fx.NoSiteError, match=r"takes \[:17\] of 20 tokens: of fewer"):
        papr_fx.transform(DeepPrompts(17).eval(), toy_proposal(), 0.5, mode="tokens", verify=False)
