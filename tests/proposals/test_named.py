"""Proposals by name."""

from pathlib import Path

import pytest
import torch
from torchvision.models.video import R3D_18_Weights, r3d_18

import papr_fx
from papr_fx.proposals.named import create_network

from ..test_clips import ClipViT


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
