"""Attention within chunks."""

from __future__ import annotations

from ..arguments import whole
from ..cells.rules import Chunk
from .positional import PositionalCache, Shift


class ChunkedAttentionCache(PositionalCache):
    """A token at p sees positions p - p % chunk_size to p.

    Chunks lie at absolute positions. Past ones give their memory back once no rewind can
    reach them.

    Args:
        chunk_size: tokens in a chunk.
        rewind: how many newest tokens can always be dropped.
        shift: as of `CausalCache`.

    Raises:
        ValueError: a chunk below 1, or a negative rewind.
    """

    def __init__(self, chunk_size: int, rewind: int = 1, shift: Shift | None = None) -> None:
        (chunk_size,) = whole(1, chunk_size=chunk_size)
        (rewind,) = whole(rewind=rewind)
        super().__init__(Chunk(chunk_size), rewind, shift)
