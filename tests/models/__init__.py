"""Small models that the tests share, and a proposal."""

from .vits import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal

__all__ = ["Attention", "Block", "Shape", "ToyViT", "enliven", "images", "toy_proposal"]
