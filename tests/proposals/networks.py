"""Networks that the tests of proposals share, and what is expected of them."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.proposals.network import SignificanceNet
from papr_fx.proposals.saliency import Saliency

from ..models import enliven


def built(proposal: object, shape: tuple[int, ...] = (1, 3, 96, 128), **options) -> SignificanceNet:
    """The significance network of a proposal for images of that shape; `options` are those of `ProposalOptions`."""
    return build_proposal(proposal, nn.Identity(), ImageSpec.of(torch.zeros(shape)), ProposalOptions(**options))


def livened(network: nn.Module) -> nn.Module:
    """Gives batch norms random statistics and scales, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -0.5),
            ):
                tensor.data = torch.rand(tensor.shape, generator=generator) + low
    return network.eval()


def before_pooling(network: nn.Module, pool: str) -> Callable[[Tensor], Tensor]:
    """A function that returns the input of the pooling module, caught by a hook: what the cut must give."""

    def features(x: Tensor) -> Tensor:
        caught: list[Tensor] = []
        handle = network.get_submodule(pool).register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0]))
        network(x)
        handle.remove()
        return caught[0]

    return features


def timm_model(name: str) -> nn.Module:
    return livened(timm.create_model(name))


class ConvNet(nn.Module):
    """A classifier of the kind that class activation maps are made for."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 16, 3, padding=1), nn.GELU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


def conv_net() -> ConvNet:
    return enliven(ConvNet()).double().eval()


def maps_of(saliency: Saliency, proposal: nn.Module, x: Tensor) -> Tensor:
    """The maps of images x by a source of saliency."""
    options = ProposalOptions(input_stats="shared", saliency=saliency)
    return build_proposal(proposal, nn.Identity(), ImageSpec.of(x), options)(x)
