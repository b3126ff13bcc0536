"""Sliding-window attention."""

from __future__ import annotations

from ..arguments import whole
from ..cells.rules import Window
from .positional import PositionalCache, Shift


class SlidingWindowCache(PositionalCache):
    """A token sees itself and the `window_size` - 1 before it, and the sinks.

    What is held after each batch is the newest `window_size` + `rewind` - 1 tokens and the
    sinks, whatever the size of the batch.

    Args:
        window_size: as mlx-lm and transformers count it, the token itself included.
        rewind: how many newest tokens can always be dropped.
        sinks: how many first tokens of each sequence stay visible and held.
        shift: as of `CausalCache`.

    Raises:
        ValueError: a window below 1, a negative number, or sinks that fill the window.
    """

    def __init__(self, window_size: int, rewind: int = 1, sinks: int = 0, shift: Shift | None = None) -> None:
        (window_size,) = whole(1, window_size=window_size)
        rewind, sinks = whole(rewind=rewind, sinks=sinks)
        if sinks >= window_size:
            raise ValueError(
                f"sinks must be 0 to {window_size - 1} in a window of {window_size}, got {sinks}"
            )
        super().__init__(Window(window_size, sinks), rewind, shift)
