"""Finds what a token model need not compute because nobody reads it: dropped patches, rows of the last tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn

from ..ops import is_watched
from ..passes import embed_kept_patches, narrow_rows
from ..passes.embed_kept_patches import Embedding
from ..passes.narrow_rows import Narrowing
from ..passes.prune_tokens import TokenSite
from ..passes.reduce_tokens import ReductionSites
from ..tracing.graphs import nodes_by_name
from ..tracing.trace import OpenError
from .inputs import Request

_Found = TypeVar("_Found")


@dataclass
class Attempt:
    """What is to be left out, and what was found.

    Attributes:
        rows: Whether to compute only those rows of the last tokens that are read.
        patches: Whether to embed the kept patches only.
        whole: Why nothing else is left out; empty if that was not asked for.
        opened: Modules that it asked to trace through.
        found: Whether it found something to leave out.
        reason: Why it found no rows.
    """

    rows: bool = False
    patches: bool = False
    whole: str = ""
    opened: set[str] = field(default_factory=set[str])
    found: bool = False
    reason: str = ""

    def find(
        self,
        request: Request,
        root: nn.Module,
        site: TokenSite,
        blocks: tuple[str, ...],
        reduced: ReductionSites,
        opened: set[str],
    ) -> tuple[Embedding, Narrowing]:
        """Where only the kept patches are embedded, and where only the rows are computed that are read later.

        Args:
            request: The model and its images.
            root: A scratch copy of the modules that the traced graph calls.
            site: The token stream.
            blocks: Qualified names of the trunk's blocks.
            reduced: Where tokens become fewer.
            opened: Qualified names of the modules that are traced through.

        Raises:
            OpenError: Modules must be traced through first: those that either of the two asks for.
        """
        model, images, _ = request

        def embedding() -> Embedding:
            found = embed_kept_patches.find_site(root, site, images, opened)
            if found.node:
                target = str(nodes_by_name(site.stream.graph)[found.node].target)
                found = Embedding(reason=f"`{target}` has hooks") if is_watched(model.get_submodule(target)) else found
            return found

        def narrowing() -> Narrowing:
            whole = {name for place in reduced.sites for name in (place.addition, place.attention)}
            whole |= {attention.node for attention in reduced.attentions}
            found = narrow_rows.find_sites(root, site, blocks, whole, opened)
            plain = tuple(split for split in found.splits if not is_watched(model.get_submodule(split.target)))
            return replace(found, splits=plain)

        asked: list[OpenError] = []
        patches = self._asked(embedding, asked) if self.patches else Embedding(reason=self.whole)
        rows = self._asked(narrowing, asked) if self.rows else Narrowing(reason=self.whole)
        if patches is None or rows is None:
            raise OpenError(set[str]().union(*(error.modules for error in asked)), asked[0].reason)
        self.found |= bool(patches.node or rows.sites)
        self.reason = rows.reason
        return patches, rows

    def _asked(self, find: Callable[[], _Found], asked: list[OpenError]) -> _Found | None:
        """What is found; None, and a further error, if modules must be traced through."""
        try:
            return find()
        except OpenError as error:
            self.opened |= error.modules
            asked.append(error)
            return None
