"""The kinds of node that passes insert and that are looked up later, see `papr_fx.tracing.roles`."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What a node is for."""

    MAP = "the saliency map of the proposal network"
    PSM = "the map, resized to a grid"
    KEEP = "the indices that are kept of a grid"
    JOINED = "all tokens, and one for each quad of patches"
    DENSE_COUNT = "the number of tokens of the dense stream"
    CHANNELS_LAST = "the images in channels-last memory"
    MATCH = "which tokens a block merges"
    REDUCED = "the tokens after a reduction"
    ROWS = "the rows that are read later"
    EMBEDDING = "the embedding of the kept patches"
    PATCHES = "the kept patches, without other tokens"
    PLACES = "which token stands for each place of the grid"
    RESTORED = "tokens that are back in their places"
    WRITTEN = "what a pixel operator writes back"
    FUSED = "an attention that was written out"
