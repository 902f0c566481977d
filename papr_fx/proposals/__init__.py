"""Turns any ConvNet into a significance network: cut before its pooling, frozen, fused; and the sources of the map.

`create_network` and `lite0` load networks by name.
It must not know how the map is used: no tokens, token grids or keep ratios.
"""

from .named import LITE0_STATISTICS, create_network, lite0

__all__ = ["LITE0_STATISTICS", "create_network", "lite0"]
