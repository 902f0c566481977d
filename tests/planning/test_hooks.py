"""Hooks of the user: they stay his objects, never see fake tensors, and what depends on them is refused by name."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx

from ..models import Shape, ToyViT, images, toy_proposal


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def after(self, _module, _args, out) -> None:
        self.seen.append(out)

    def before(self, _module, args) -> None:
        args[0].mean().item()  # fails on a fake tensor
        self.seen.append(args[0])

    def __call__(self, _module, _args, out) -> None:
        self.seen.append(out)


@pytest.mark.parametrize("kind", ["after", "before", "called"])
def test_a_hook_is_the_users_own_object(kind):
    model, recorder = ToyViT(Shape()).eval(), Recorder()
    block = model.blocks[0]
    if kind == "before":
        block.register_forward_pre_hook(recorder.before)
    else:
        block.register_forward_hook(recorder.after if kind == "after" else recorder)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    assert not recorder.seen
    gm(images(Shape(), 2, dtype=torch.float32))
    assert [value.shape for value in recorder.seen] == [(2, 9, 8)]  # int(17 * 0.5) patches and the class token


class OwnHook(ToyViT):
    """Its hook is a method of the model: the copy has its own."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.calls = 0
        self.blocks[1].register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.calls += 1


def test_a_hook_that_is_a_method_of_the_model_belongs_to_its_copy():
    model = OwnHook().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    gm(images(Shape(), 1, dtype=torch.float32))
    assert model.calls == 0


class ReadsHooks(nn.Module):
    """A dense head on what a hook stores, as in DPT."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ToyViT(Shape())
        self.stored: dict[str, Tensor] = {}
        self.vit.blocks[0].register_forward_hook(lambda _m, _i, out: self.stored.__setitem__("tokens", out))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.vit(x)
        return self.head(self.stored["tokens"].mean(1))


@pytest.mark.parametrize("mode", ["auto", "tokens", "pixels"])
def test_what_depends_on_a_hook_is_refused(mode):
    example = images(Shape(), 1, dtype=torch.float32)
    with pytest.raises(papr_fx.TraceError, match=r"Forward hooks \(of vit\.blocks\.0\) do not run while"):
        papr_fx.transform(ReadsHooks().eval(), toy_proposal(), 0.5, example_input=example, mode=mode)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_that_compute_weights_run():
    model = ToyViT(Shape())
    nn.utils.weight_norm(model.blocks[0].attn.qkv)
    model.eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(Shape(), 2, dtype=torch.float32)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model(x))


class PlainTable(ToyViT):
    """A plain tensor as position table, expanded to the batch."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.table = torch.randn(1, 17, 8)

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.table.expand(x.size(0), -1, -1)


@torch.no_grad()
def test_plain_tensors_are_values_of_the_graph():
    model = PlainTable().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert gm.state_dict().keys() == model.state_dict().keys()
    papr_fx.set_keep_ratio(gm, 1.0)
    for batch in (1, 5):
        x = images(Shape(), batch, dtype=torch.float32)
        assert torch.equal(gm(x), model(x))
