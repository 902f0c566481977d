"""Makes a significance network of any ConvNet: cut before its pooling, frozen, fused; and the sources of the map.

Networks can be loaded by name: `create_network`, `lite0`.
It must not know how the map is used: no token, grid or keep ratio.
"""

from .named import LITE0_STATISTICS, create_network, lite0

__all__ = ["LITE0_STATISTICS", "create_network", "lite0"]
