"""Full attention."""

from __future__ import annotations

from ..cells.rules import Causal
from .positional import PositionalCache, Shift


class CausalCache(PositionalCache):
    """Full attention: a token sees itself and all before it in its sequence.

    Args:
        shift: re-bases keys so that a range in the middle can be removed; see `rope_shift`.
    """

    def __init__(self, shift: Shift | None = None) -> None:
        super().__init__(Causal(), rewind=0, shift=shift)
