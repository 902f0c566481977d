"""Proposals by name."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torchvision.models.video import R3D_18_Weights, r3d_18

import papr_fx
from papr_fx.evaluation.models import image_model, proposal_for
from papr_fx.proposals.named import create_network

from ..test_clips import ClipViT
from ..versions import LOADERS_OF_TIMM


def test_networks_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / Path(R3D_18_Weights.DEFAULT.url).name
    weights.parent.mkdir(parents=True)
    network = r3d_18()
    torch.save(network.state_dict(), weights)
    model = ClipViT((2, 12, 16), 0)
    example = torch.zeros(1, 3, 4, 48, 48)
    named = papr_fx.transform(model, "r3d_18", 0.5, example_input=example, verify=False)
    given = papr_fx.transform(model, network, 0.5, example_input=example, verify=False)
    x = torch.randn(1, 3, 4, 48, 48)
    assert torch.equal(papr_fx.significance(named, x), papr_fx.significance(given, x))
    assert create_network("x3d_s", pretrained=False).blocks
    with pytest.raises(papr_fx.ProposalError, match="know no network named 'slow_of_my_own'"):
        create_network("slow_of_my_own", pretrained=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Names of a model and a proposal in folders that timm wrote, and both networks."""
    folder = tmp_path_factory.mktemp("saved")
    options = {"img_size": 64, "depth": 1, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    proposal = timm.create_model("resnet10t", num_classes=3).eval()
    save_for_hf(model, str(folder / "model"), model_args=options)
    save_for_hf(proposal, str(folder / "proposal"))
    return f"local-dir:{folder / 'model'}", f"local-dir:{folder / 'proposal'}", model, proposal


@torch.no_grad()
def test_networks_that_timm_saved(saved):
    model_name, proposal_name, model, proposal = saved
    x = torch.randn(2, 3, 64, 64)
    loaded = image_model(model_name, pretrained=True)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(create_network(proposal_name, pretrained=True).eval()(x), proposal(x))
    network, statistics = proposal_for(((0.5,) * 3, (0.5,) * 3), proposal_name, pretrained=True)
    assert torch.equal(network(x), proposal(x))
    assert [list(part) for part in statistics[1]] == [list(proposal.pretrained_cfg[key]) for key in ("mean", "std")]
    named = papr_fx.transform(loaded, proposal_name, 0.5, verify=False)
    given = papr_fx.transform(model, proposal, 0.5, verify=False)
    assert torch.equal(named(x), given(x))


@LOADERS_OF_TIMM
def test_folders_without_a_model_of_timm(tmp_path):
    name = f"local-dir:{tmp_path}"
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    with pytest.raises(papr_fx.ProposalError, match="Config file not found"):
        papr_fx.transform(model, name, 0.5)
    with pytest.raises(papr_fx.ArgumentError, match="the weights of 'local-dir:.*' could not be loaded: FileNotFoundError"):
        image_model(name, pretrained=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(papr_fx.ProposalError, match="holds no model that timm can build"):
        papr_fx.transform(model, name, 0.5)
    with pytest.raises(papr_fx.ProposalError, match="know no network named 'local-dir:'"):
        create_network("local-dir:", pretrained=True)
    with pytest.raises(papr_fx.ArgumentError, match="hf-hub:OWNER/NAME or local-dir:FOLDER"):
        image_model(str(tmp_path), pretrained=True)
