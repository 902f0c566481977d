"""Hidden keys: tokens that meet outside of attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import papr_fx
from papr_fx.proof import hidden_keys
from papr_fx.proof.hidden_keys import HiddenKeys
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Shape, ToyViT, enliven, toy_proposal
from ..oracles import attention_without
from .parts import case_of, failures


class Mixing(nn.Module):
    """A block of an MLP-Mixer: tokens meet in a matrix of their number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.matrix = nn.Parameter(torch.randn(count, count))
        self.layer = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return x + self.layer(self.matrix @ self.norm(x))


class Static(Attention):
    """Attention plus weights that do not depend on the image: normalised over all tokens, they cannot be cut."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, False)
        self.table = nn.Parameter(torch.randn(1, 2, count, count))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q, k).softmax(-1) + self.table.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def mixer() -> ToyViT:
    model = ToyViT(Shape(prefix=0))
    model.blocks = nn.ModuleList(Mixing(16) for _ in range(2))
    return enliven(model)


def static() -> ToyViT:
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = Static(17)
    return enliven(model)


@pytest.mark.parametrize(("make", "message"), [(mixer, "no attention over the 16 tokens"), (static, "`add_6` are off by")])
def test_only_hidden_keys_find_tokens_that_meet_outside_of_attention(make, message):
    found = failures(case_of(make()))
    assert list(found) == ["hidden keys"]
    assert message in found["hidden keys"]


@pytest.mark.parametrize(
    ("make", "message"),
    [(mixer, "hidden keys: no attention over the 16 tokens"), (static, "hidden keys: the kept tokens of `add_6` are off")],
)
def test_tokens_that_meet_outside_of_attention_are_caught(make, message):
    with pytest.raises(papr_fx.VerifyError, match=message):
        papr_fx.transform(make(), toy_proposal(), 0.5)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_hidden_keys_equal_attention_over_the_rest(masked):
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    hidden = torch.tensor([[False, True, False, False, True, False]] * 2)
    seen = ~hidden[0]
    mask = None if masked is None else torch.rand(6, 6) > 0.4
    if mask is not None:
        mask |= torch.eye(6, dtype=torch.bool)
        mask[:, 0] = True
    given = mask if masked == "bool" else None if mask is None else torch.where(mask, 0.0, float("-inf")).double()
    expected = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen], None if given is None else given[:, seen])
    with HiddenKeys(hidden) as mode:
        actual = F.scaled_dot_product_attention(q, k, v, given)
    assert mode.seen == 1
    assert torch.allclose(actual, expected, atol=1e-12, rtol=0)
    with attention_without(hidden) as calls:
        by_hand = F.scaled_dot_product_attention(q, k, v, given)
    assert calls.seen == 1
    assert torch.allclose(by_hand, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_part_agrees_with_attention_cut_by_hand():
    """On the redrawn model, by an oracle that shares no code with the part."""
    case = case_of(ToyViT(Shape(pool="cls")))
    (keep,) = case.indices(case.kept)
    hidden = torch.ones(1, 17, dtype=torch.bool).scatter(1, keep, False)
    with attention_without(hidden):
        expected = functional_call(case.model, case.values, (case.images[:1],))
    assert relative_error(case.kept_output, expected) < 1e-12
    assert hidden_keys.error(case, case.kept, case.kept) < 1e-12
    assert hidden_keys.error(case, case.kept, [case.kept[0][:, 1:]]) > 1e-4


class Columns(Attention):
    """Sound attention whose keys are the second last axis of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (k @ q.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-2)  # (B, H, keys, queries)
        return self.proj((weights.transpose(-2, -1) @ v).transpose(1, 2).reshape(b, n, c))


def test_attention_over_another_axis_is_proved():
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = Columns(8, 2, False)
    assert not failures(case_of(enliven(model)))
    papr_fx.transform(model, toy_proposal(), 0.5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_padding_mask_stays(kind):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    padding = torch.tensor([[False, False, True, False, False, False]] * 2)
    hidden = torch.tensor([[False, True, False, False, True, False]] * 2)
    given = padding if kind == "bool" else torch.zeros(2, 6, dtype=torch.float64).masked_fill(padding, float("-inf"))
    with HiddenKeys(hidden) as mode:
        found, _ = attention(x, x, x, key_padding_mask=given)
    seen = ~(padding | hidden)[0]
    expected, _ = attention(x, x[:, seen], x[:, seen])
    assert mode.seen == 1
    assert torch.allclose(found, expected, atol=1e-12)
