"""What all layers of one prompt cache share: its sequence, and the forward under way."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from ..arrays.store import Rebase
from ..batch import Batch
from ..caches.plan import Plan
from ..caches.step import Part, Step
from ..cells.removal import rebase_all, remove_range
from ..cells.rules import Causal
from ..errors import CacheError, CacheFullError, NotSupportedError
from .head import Head, HeadRebase
from .pool import Pool

if TYPE_CHECKING:
    from .layer import LayerCache

Overflow = Literal["error", "shift"]

FARTHEST = 1 << 16
"""Beyond this lead, float32 angles lose precision, and all keys are rotated back by it."""


class SequenceState:
    """One sequence of a pool, as the layers of a model fill it.

    mlx-lm tells nobody when a forward begins or ends. It begins when a layer asks for a mask
    or writes with nothing left to write, and is over when every layer has written. One that
    is still open when a layer asks or writes again was left by an exception; it is undone.
    """

    def __init__(self, pool: Pool, capacity: int | None, overflow: Overflow, sinks: int) -> None:
        self.pool = pool
        self.sequence = pool.new_sequence()
        self.capacity = capacity
        self.overflow: Overflow = overflow
        self.sinks = sinks
        self.head = Head()
        self.layers: list[LayerCache] = []
        self.forward = 0
        self.tokens = 0
        self.trims = 0
        self.trimmed = 0
        self.interrupted = False
        self._unwritten = 0
        self._plan: Plan | None = None
        self._step: Step | None = None
        self.release = weakref.finalize(self, pool.drop, self.sequence)

    @property
    def position(self) -> int:
        """Tokens in the cache; those of an unfinished forward do not count."""
        self.check_open()
        end = self.pool.cache.end(self.sequence)
        return end - self.tokens if self._unwritten else end

    @property
    def unfinished(self) -> bool:
        """Whether a forward is under way, or was left by an exception."""
        return self._unwritten > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the K and V that are held, what is shared counted in full."""
        return self.position * self.pool.cache._store.cell_bytes

    def serve(self, layers: list[LayerCache]) -> None:
        """Take these as the layers, and bring them to where the sequence ends."""
        self.layers = layers
        self._forget_step()

    def check_open(self) -> None:
        if not self.release.alive:
            raise CacheError("the prompt cache is closed")

    def close(self) -> None:
        self.release()

    def begin(self, n: int) -> None:
        """Start a forward of n tokens, after making room for them."""
        self.settle()
        self._make_room(n)
        cache, end = self.pool.cache, self.position
        self._plan = cache._begin(Batch.run(self.sequence, end, n), reserve=False)
        assert isinstance(cache._step, Step)
        self._step = cache._step
        self._unwritten = len(self.layers)
        self.interrupted = False
        self.tokens = n
        self.forward += 1

    def is_open(self, n: int) -> bool:
        """Whether a forward of n tokens is under way."""
        return self._unwritten > 0 and self.tokens == n

    def write(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a layer's K and V of this forward and return its history."""
        step = self._step
        assert step is not None
        cache = self.pool.cache
        if cache._step is not step:
            raise CacheError("another prompt cache of the same pool has been used in the middle of a forward")
        return step.exchange(layer, keys, values)

    def wrote(self) -> None:
        """A layer is done. After the last one, make room early where it cannot be made later."""
        self._unwritten -= 1
        if not self._unwritten and self.overflow == "shift" and self.position == self.capacity:
            self._shift_early()

    def part(self) -> Part:
        """The forward under way, as positions."""
        assert self._step is not None
        return self._step.parts[0]

    def settle(self) -> None:
        """Undo a forward that was left unfinished."""
        self.check_open()
        if self._unwritten and self._plan:
            self._plan.undo()
            self._forget_step()
        self.pool.take_turn(self)

    def rewind_to(self, position: int) -> None:
        self.settle()
        self.pool.cache.remove(self.sequence, position)
        self.head = self.head.cut(position)
        self._forget_step()

    def remove(self, begin: int, end: int) -> None:
        """Take out [begin, end), which are followed by others."""
        self.settle()
        cache, scheme, gap = self.pool.cache, self.pool.scheme, end - begin
        if scheme.refusal:
            raise NotSupportedError(f"removing [{begin}, {end}) of {self.position} tokens: {scheme.refusal}")
        if scheme.ahead:
            if self.head.lead + gap > FARTHEST:
                self._renormalise()
            removal = remove_range(cache._table, self.sequence, begin, end, Causal(), rebase_head=True)
            rebase = HeadRebase(scheme, self.head, begin, gap)
            cache._plan_edit(removal, rebase).commit()
            self.head = rebase.moved
        else:
            removal = remove_range(cache._table, self.sequence, begin, end, Causal())
            cache._plan_edit(removal, self._by(-gap)).commit()
        self._forget_step()

    def fork(self) -> SequenceState:
        self.settle()
        other = SequenceState(self.pool, self.capacity, self.overflow, self.sinks)
        self.pool.cache.copy_prefix(self.sequence, other.sequence, self.position)
        other.head = self.head
        return other

    def _make_room(self, n: int) -> None:
        position = self.position
        if self.capacity is None or position + n <= self.capacity:
            return
        free, sinks = self.capacity - position, min(self.sinks, position)
        if self.overflow == "error":
            raise CacheFullError(n, free, self.capacity, "remove or rewind tokens first")
        if n > self.capacity - sinks:
            raise CacheFullError(n, self.capacity - sinks, self.capacity, "feed smaller blocks")
        if not self.pool.scheme.ahead:
            # The model may have read its offset already, and a shift would change it.
            raise CacheFullError(n, free, self.capacity, "remove tokens before feeding a block to this model")
        self._shift(n)

    def _shift_early(self) -> None:
        if not self.pool.scheme.ahead:
            self._shift(1)

    def _shift(self, n: int) -> None:
        """Drop the older half after the sinks, or more if n tokens need it."""
        assert self.capacity is not None
        position = self.position
        sinks = min(self.sinks, position)
        drop = max((position - sinks) // 2, n - (self.capacity - position))
        if sinks + drop < position:
            self.remove(sinks, sinks + drop)
        else:
            self.rewind_to(sinks)

    def _renormalise(self) -> None:
        """Rotate everything back, so that offsets equal positions again."""
        cache = self.pool.cache
        cache._plan_edit(
            rebase_all(cache._table, self.sequence, -self.head.lead), self._by(-self.head.lead)
        ).commit()
        self.head = Head()

    def _by(self, offset: int) -> Rebase:
        rotations = self.pool.scheme.rotations

        def rebase(layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            rotation = rotations[layer]
            if rotation is None:
                return keys, values
            if rotation.slot == "keys":
                return rotation.apply(keys, offset), values
            return keys, rotation.apply(values, offset)

        return rebase

    def _forget_step(self) -> None:
        """Between forwards: every layer stands where the sequence ends."""
        self._unwritten, self._plan, self._step = 0, None, None
        offset = self.pool.cache.end(self.sequence) + self.head.lead
        for layer in self.layers:
            layer.offset = offset
            layer.forward = layer.asked = self.forward
            layer.trims = self.trims
