"""Who holds which cells: what the caches of a model look like, for pictures and tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...arguments import class_of
from ...caches.recurrent import RecurrentCache
from ...cells.spans import Span, Spans
from ...cells.visibility import Chunk, Rule, Window
from .pool import Pool

__all__ = ["Holding", "Span", "holdings"]


@dataclass(frozen=True)
class Holding:
    """What is held for one kind of layer. Numbers only: nothing here keeps an array alive.

    Attributes:
        rule: who sees whom; None for recurrent layers, which have no cells.
        layers: how many layers are of this kind.
        segments: rows of cells that are stored together, by name, and how many cells each has.
        packed: segments that are stored in fewer bits.
        runs: for each sequence the runs of cells with its tokens, in order of position; what
            several have in common is shared. A `Span` has `segment`, `start`, `position` and
            `length`.
        checkpoints: for each sequence the positions whose states are kept.
    """

    rule: Rule | None
    layers: int
    segments: Mapping[int, int] = field(default_factory=dict)
    packed: frozenset[int] = frozenset()
    runs: Mapping[int, Spans] = field(default_factory=dict)
    checkpoints: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kind in words."""
        if self.rule is None:
            return "recurrent"
        if isinstance(self.rule, Window):
            return f"window {self.rule.size}"
        return f"chunks of {self.rule.size}" if isinstance(self.rule, Chunk) else "full attention"


def holdings(pool: Pool) -> tuple[Holding, ...]:
    """What prompt caches that share a pool (`PromptCache.pool`) hold now, one for each kind of layer.

    Waits while the model runs in another thread.

    Raises:
        TypeError: not a pool.
    """
    if not isinstance(pool, Pool):
        raise TypeError(f"holdings are of a pool, such as PromptCache.pool, got {class_of(pool)}")
    with pool.lock:
        return tuple(
            _states(cache, pool.kinds.count(index))
            if isinstance(cache, RecurrentCache)
            else Holding(
                cache._rule,
                pool.kinds.count(index),
                {segment: cache._table.capacity[segment] for segment in cache._table.owned()},
                frozenset(cache._table.packed.intersection(cache._table.owned())),
                {name: sequence.spans for name, sequence in cache._table.sequences.items()},
            )
            for index, cache in enumerate(pool.caches)
        )


def _states(cache: RecurrentCache, layers: int) -> Holding:
    kept = {name: tuple(sorted(stream.states)) for name, stream in cache._streams.items()}
    return Holding(None, layers, checkpoints=kept)
