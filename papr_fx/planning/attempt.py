"""An attempt to leave out what nobody reads: rows of the last tokens, or patches."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from ..passes import embed_kept_patches, narrow_rows
from ..passes.embed_kept_patches import Embedding
from ..passes.narrow_rows import Narrowing
from ..passes.prune_tokens import TokenSite
from ..passes.reduce_tokens import ReductionSites
from ..tracing.fakes import hooked
from ..tracing.trace import OpenError
from . import inputs


@dataclass
class Attempt:
    """What an attempt to leave out what nobody reads did.

    Attributes:
        rows: Whether it tries to compute only those rows of the last tokens that are read.
        patches: Whether it tries to embed the kept patches only.
        opened: Modules that it asked to trace through.
        found: Whether it found something to leave out.
        reason: Why it found none.
    """

    rows: bool
    patches: bool
    opened: set[str] = field(default_factory=set[str])
    found: bool = False
    reason: str = ""

    def narrowing(
        self, root: nn.Module, site: TokenSite, blocks: tuple[str, ...], reduced: ReductionSites, opened: set[str]
    ) -> Narrowing:
        """Where only the rows are computed that are read later."""
        whole = {name for place in reduced.sites for name in (place.addition, place.attention)}
        whole |= {attention.node for attention in reduced.attentions}
        with self._trying():
            found = narrow_rows.find_sites(root, site, blocks, whole, opened)
        self.found |= bool(found.sites)
        self.reason = found.reason
        return found

    def embedding(self, root: nn.Module, site: TokenSite, request: inputs.Request, opened: set[str]) -> Embedding:
        """Where only the kept patches are embedded."""
        with self._trying():
            found = embed_kept_patches.find_site(root, site, request.images, opened, hooked(request.model))
        self.found |= bool(found.node)
        return found

    @contextmanager
    def _trying(self) -> Generator[None]:
        """Notes which modules are asked for."""
        try:
            yield
        except OpenError as error:
            self.opened |= error.modules
            raise
