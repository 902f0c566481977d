"""`transform` leaves the model unchanged, shares its tensors, follows its mode, and returns a module that compiles."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import timm
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import papr_fx
from papr_fx.tracing.numerics import relative_error

from .models import Shape, ToyViT, images, toy_proposal


def pruned(z: float = 0.5, **options):
    model = ToyViT(Shape(**options)).eval()
    return model, papr_fx.transform(model, toy_proposal(), z)


def structure(model: nn.Module) -> list[tuple[str, int, bool, dict[str, object]]]:
    """Every module with its training flag and plain attributes."""
    plain = {"training", "heads", "fused", "image_size", "shape"}
    return [(n, id(m), m.training, {k: v for k, v in vars(m).items() if k in plain}) for n, m in model.named_modules()]


def test_the_model_is_untouched():
    model = ToyViT(Shape()).train()
    model.norm.eval()
    before, state = structure(model), {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    gm.eval()
    gm.train()
    assert structure(model) == before
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == {k: i for k, (i, _) in state.items()}
    assert all(torch.equal(v, state[k][1]) for k, v in model.state_dict().items())


def test_the_proposal_is_untouched():
    proposal = toy_proposal().train()
    before = copy.deepcopy(proposal.state_dict())
    papr_fx.transform(ToyViT(Shape()), proposal, 0.5)
    assert proposal.training
    assert all(torch.equal(v, before[k]) for k, v in proposal.state_dict().items())


def test_flags_of_submodules_are_kept():
    model = ToyViT(Shape()).train()
    model.blocks[0].eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    flags = {n: m.training for n, m in gm.named_modules()}
    assert all(flags[n] == m.training for n, m in model.named_modules())


def test_parameters_are_shared_under_their_own_names():
    model, gm = pruned()
    own = dict(gm.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    missed = gm.load_state_dict(model.state_dict(), strict=False)
    assert not missed.unexpected_keys
    assert all(key.startswith("papr_proposal.") for key in missed.missing_keys)


def test_no_module_object_is_shared():
    model, gm = pruned()
    assert not {id(m) for m in model.modules()} & {id(m) for m in gm.modules()}


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_any_batch_size(batch):
    model, gm = pruned()
    x = images(model.shape, batch, dtype=torch.float32)
    assert relative_error(gm(x), torch.cat([gm(sample[None]) for sample in x])) < 1e-5


def test_set_keep_ratio_to_and_from_one():
    model, gm = pruned(1.0)
    x = images(model.shape, 3, dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    assert all(bool(mask.all()) for mask in papr_fx.keep_masks(gm, x).values())
    for z in (0.5, 0.25, 1.0, 0.5):
        papr_fx.set_keep_ratio(gm, z)
        fresh = papr_fx.transform(model, toy_proposal(), z, verify=False)
        assert torch.equal(gm(x), fresh(x))
    with pytest.raises(papr_fx.ArgumentError):
        papr_fx.set_keep_ratio(gm, 1.5)
    assert papr_fx.report(gm).z == 0.5


def test_significance_and_masks():
    model, gm = pruned()
    x = images(model.shape, 4, dtype=torch.float32)
    maps = papr_fx.significance(gm, x)
    assert maps.shape == (4, 8, 12)
    with torch.no_grad():
        assert relative_error(maps, toy_proposal().eval()(x).mean(1)) < 1e-5
    (mask,) = papr_fx.keep_masks(gm, x).values()
    assert mask.shape == (4, 4, 4)
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [8] * 4  # int((16 + 1) * 0.5)


def test_same_images_same_choice():
    model, gm = pruned()
    x = images(model.shape, 4, dtype=torch.float32)
    first, second = (papr_fx.keep_masks(gm, x)[(4, 4)] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("z", [0.5, 1.0])
def test_copies_and_pickles(z):
    model, gm = pruned(z)
    x = images(model.shape, 2, dtype=torch.float32)
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), loaded):
        assert torch.equal(other(x), gm(x))
        assert [n.name for n in other.graph.nodes] == [n.name for n in gm.graph.nodes]
        papr_fx.set_keep_ratio(other, 0.25)
        assert papr_fx.report(other).sites[0].kept == 1 + 4
    assert papr_fx.report(gm).z == z
    copied = copy.deepcopy(gm)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in gm.parameters()}


def test_moves_and_casts():
    model, gm = pruned()
    wide = copy.deepcopy(gm).double()
    x = images(model.shape, 2)
    assert relative_error(wide(x).float(), gm(x.float())) < 1e-4
    papr_fx.set_keep_ratio(wide, 0.25)
    assert wide(x).dtype == torch.float64


def test_a_meta_model_is_traced_without_proof():
    model = ToyViT(Shape()).to("meta")
    with pytest.raises(papr_fx.ArgumentError, match="verify=False"):
        papr_fx.transform(model, toy_proposal(), 0.5)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    real = ToyViT(Shape()).eval()
    gm.load_state_dict(real.state_dict(), strict=False, assign=True)
    gm.eval()
    x = images(real.shape, 2, dtype=torch.float32)
    assert relative_error(gm(x), papr_fx.transform(real, toy_proposal(), 0.5)(x)) < 1e-6


class ModeViT(ToyViT):
    """A forward that computes something else in training."""

    def classify(self, x: Tensor) -> Tensor:
        return (super().classify(x) * 3) if self.training else super().classify(x)


def test_a_forward_that_reads_training_follows_the_mode():
    model = ModeViT(Shape()).eval()
    for block in model.blocks:
        block.mlp[2].p = 0.0
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(model.shape, 2, dtype=torch.float32)
    evaluated = gm(x)
    gm.train()
    assert relative_error(gm(x), 3 * evaluated) < 1e-5
    gm.eval()
    assert torch.equal(gm(x), evaluated)


def test_patch_dropout_is_refused_in_training_only():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, patch_drop_rate=0.5)
    gm = papr_fx.transform(model.eval(), toy_proposal(), 0.5)
    with pytest.raises(papr_fx.NoSiteError, match="patch_drop.*17 tokens to 9"):
        gm.train()
    assert not gm.training
    with pytest.raises(papr_fx.NoSiteError, match="patch_drop"):
        papr_fx.transform(model.train(), toy_proposal(), 0.5)


def test_dropout_draws_anew_in_training():
    _, gm = pruned()
    gm.train()
    x = torch.randn(2, 3, 8, 12)
    assert not torch.equal(gm(x), gm(x))


def compilations(module: nn.Module, shape: Shape) -> int:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 4):
            compiled(images(shape, batch, dtype=torch.float32))
    return counter.frame_count


def test_compiles_as_one_graph_and_no_more_often_than_the_model():
    model, gm = pruned()
    assert compilations(gm, model.shape) <= compilations(model, model.shape)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside inductor
def test_compiled_by_inductor_equals_eager_and_follows_set_keep_ratio():
    torch._dynamo.reset()
    model, gm = pruned(depth=1)
    x = images(model.shape, 2, dtype=torch.float32)
    compiled = torch.compile(gm, fullgraph=True)
    with torch.no_grad():
        for z in (0.5, 1.0):
            papr_fx.set_keep_ratio(gm, z)
            assert relative_error(compiled(x), gm(x)) < 1e-4
    assert relative_error(compiled(x), model(x)) < 1e-4


def test_nothing_is_kept_alive():
    model, gm = pruned()
    held = weakref.ref(gm), weakref.ref(model)
    del gm, model
    gc.collect()
    assert [ref() for ref in held] == [None, None]
