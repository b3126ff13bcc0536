"""Describes how the sequences of a pool occupy its cells, for pictures and tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...arguments import class_of
from ...caches.causal import PositionalCache
from ...caches.recurrent import RecurrentCache
from ...cells.spans import Span, Spans
from ...cells.visibility import Chunk, Rule, Window
from .pool import Pool

__all__ = ["Holding", "Span", "holdings"]


@dataclass(frozen=True)
class Holding:
    """The cells in use for one kind of layer. Holds numbers only and keeps no array alive.

    Attributes:
        rule: the visibility rule; None for recurrent layers, which have no cells.
        layers: the number of layers of this kind.
        segments: the number of cells of each segment, by the segment's name.
        packed: the segments that are stored quantized.
        runs: for each sequence the spans of its tokens, in order of position. Sequences that share tokens
            have the same cells in their spans. A `Span` has `segment`, `start`, `position` and `length`.
        checkpoints: for each sequence of a recurrent layer, the positions of its checkpoints.
    """

    rule: Rule | None
    layers: int
    segments: Mapping[int, int] = field(default_factory=dict)
    packed: frozenset[int] = frozenset()
    runs: Mapping[int, Spans] = field(default_factory=dict)
    checkpoints: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kind of layer, such as "window 1024"."""
        if self.rule is None:
            return "recurrent"
        if isinstance(self.rule, Window):
            return f"window {self.rule.size}"
        return f"chunks of {self.rule.size}" if isinstance(self.rule, Chunk) else "full attention"


def holdings(pool: Pool) -> tuple[Holding, ...]:
    """Return the cells in use by all prompt caches of a pool, one `Holding` for each kind of layer.

    Waits while the model runs in another thread.

    Args:
        pool: a pool of prompt caches, such as `PromptCache.pool`.

    Raises:
        TypeError: `pool` is not a pool.
    """
    if not isinstance(pool, Pool):
        raise TypeError(f"pool must be a Pool, such as PromptCache.pool, got {class_of(pool)}")
    with pool.lock:
        return tuple(_holding(cache, pool.kinds.count(kind)) for kind, cache in enumerate(pool.caches))


def _holding(cache: PositionalCache | RecurrentCache, layers: int) -> Holding:
    if isinstance(cache, RecurrentCache):
        kept = {name: tuple(sorted(stream.states)) for name, stream in cache._streams.items()}
        return Holding(None, layers, checkpoints=kept)
    table = cache._table
    segments = {segment: table.capacity[segment] for segment in table.owned()}
    runs = {name: sequence.spans for name, sequence in table.sequences.items()}
    return Holding(cache._rule, layers, segments, frozenset(table.packed.intersection(segments)), runs)
