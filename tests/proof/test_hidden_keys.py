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


class Extra(nn.Module):
    """A block that does something with a softmax over its tokens, after its attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attn, self.norm = Attention(8, 2, True), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        scores, values = self.norm(x), self.mlp(x)
        match self.kind:
            case "gate":
                return x + values * scores.softmax(dim=1)
            case "gate by one score":
                return x * (1 + scores[..., :1].softmax(1))
            case "gate that is cast":
                return x + values * F.softmax(scores, dim=-2).to(x.dtype).clone()
            case "product with channels":
                return x + scores.softmax(dim=1).transpose(1, 2).contiguous().transpose(1, 2).sigmoid() * values
            case "context":
                return x + (scores[..., :1].softmax(dim=1) * values).sum(dim=1, keepdim=True)
            case "product of vectors":
                return x + torch.linalg.vecdot(scores.softmax(dim=1), values, dim=1).unsqueeze(1)
            case "mean of weights":
                return x + (scores.softmax(dim=1) * values).mean(1, keepdim=True) * 0
            case "linear attention":
                return x + x.softmax(dim=-1) @ (scores.softmax(dim=1).transpose(1, 2) @ values)
            case _:
                return x + torch.einsum("bnc,bnd->bcd", scores.softmax(dim=1), values).mean(1, keepdim=True)


def with_extra(kind: str) -> ToyViT:
    model = ToyViT(Shape())
    model.blocks = nn.ModuleList(Extra(kind) for _ in range(2))
    return enliven(model)


@pytest.mark.parametrize("kind", ["gate", "gate by one score", "gate that is cast", "product with channels"])
def test_a_softmax_over_tokens_that_gates_them_is_refused(kind):
    found = failures(case_of(with_extra(kind)))
    assert list(found) == ["hidden keys"]
    assert "is no attention: its weights multiply each token instead of being summed" in found["hidden keys"]


class ByLargest(Extra):
    """A block that scales its tokens by the largest value that any of them has in a channel."""

    def __init__(self, channel: int) -> None:
        super().__init__("context")
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * (1 + x[..., self.channel].amax(dim=1).sigmoid()[:, None, None])


@pytest.mark.parametrize("channel", range(5))
def test_one_token_that_scales_all_is_seen(channel):
    """Whichever it is: in one of two choices it is dropped."""
    model = with_extra("context")
    model.blocks[1] = ByLargest(channel)
    with pytest.raises(papr_fx.VerifyError, match=r"hidden keys: the kept tokens of .* are off"):
        hidden_keys.check(case_of(enliven(model)))


@pytest.mark.parametrize("kind", ["context", "product of vectors", "mean of weights", "linear attention", "einsum"])
def test_weights_that_are_summed_with_values_are_attention(kind):
    assert not failures(case_of(with_extra(kind)))


class ExtraKeys(Attention):
    """Attention with keys and values of its own in front of the tokens' or behind them (prefix tuning)."""

    def __init__(self, *, behind: bool) -> None:
        super().__init__(8, 2, True)
        self.behind = behind
        self.extra = nn.Parameter(torch.zeros(2, 1, 2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        pairs = [[own.expand(b, -1, -1, -1), given] for own, given in zip(self.extra, (k, v), strict=True)]
        k, v = (torch.cat(pair[::-1] if self.behind else pair, dim=2) for pair in pairs)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("behind", [False, True])
def test_attention_may_have_keys_of_its_own(behind):
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = ExtraKeys(behind=behind)
    assert not failures(case_of(enliven(model)))


class MixedHeads(Attention):
    """Attention whose heads are mixed after the softmax, so that hidden keys get weights again, and summed in some way."""

    def __init__(self, kind: str) -> None:
        super().__init__(8, 2, False)
        self.kind = kind
        self.mixed = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q, k).softmax(-1)
        weights = self.mixed(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.kind == "einsum":
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        elif self.kind == "by name":
            mixed = torch.matmul(input=weights, other=v)
        elif self.kind == "batched":
            mixed = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (b, 2))
        else:
            mixed = weights @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("kind", ["matmul", "einsum", "by name", "batched"])
def test_weights_may_be_mixed_before_their_sum(kind):
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = MixedHeads(kind)
    assert not failures(case_of(enliven(model)))


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
