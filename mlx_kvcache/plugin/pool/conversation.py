"""One sequence of a pool: what is edited, forked and bounded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Literal, NamedTuple

import mlx.core as mx

from ...arguments import whole
from ...caches.plan import JointPlan, Plan
from ...cells.removal import rebase_all, remove_range
from ...errors import CacheError, CacheFullError, NotSupportedError
from ...storage.buffers import Rebase
from ..rope.rebase import Head, HeadRebase, rebased
from .pool import Pool

Overflow = Literal["error", "shift"]

FARTHEST = 1 << 16
"""Beyond this lead, float32 angles lose precision, and all keys are rotated back by it."""


class Limits(NamedTuple):
    """How long a conversation may get, and how far it can go back.

    Attributes:
        capacity: the most tokens; None for no bound.
        overflow: what happens when more come.
        sinks: first tokens that a shift never removes.
        rewind: newest tokens that windows and chunks can always drop.
    """

    capacity: int | None = None
    overflow: Overflow = "error"
    sinks: int = 0
    rewind: int = 64

    def checked(self) -> Limits:
        """The same in plain ints.

        Raises:
            ValueError: one is out of range, or would do nothing without another.
            TypeError: one is no number.
        """
        capacity, overflow, sinks, rewind = self
        if capacity is not None:
            (capacity,) = whole(1, capacity=capacity)
        if overflow not in ("error", "shift"):
            raise ValueError(f'overflow must be "error" or "shift", got {overflow!r}')
        rewind, sinks = whole(rewind=rewind, sinks=sinks)
        if capacity is not None and sinks >= capacity:
            raise ValueError(f"sinks must be below the capacity of {capacity}, got {sinks}")
        if overflow == "shift" and capacity is None:
            raise ValueError('overflow="shift" needs a capacity, such as capacity=4096')
        if sinks and overflow != "shift":
            raise ValueError(
                f'sinks={sinks} are first tokens that a shift keeps: give overflow="shift" and a capacity, '
                "too. How many tokens a window keeps is the model's own"
            )
        return Limits(capacity, overflow, sinks, rewind)


class Conversation:
    """A sequence, and what happens when it gets longer than its capacity.

    Its methods belong between forwards. After any error everything is as it was.

    Attributes:
        gaps: how often tokens have been taken out that others followed. What comes after a gap was
            computed with knowledge of what is gone.
    """

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self.pool = pool
        self.sequence = pool.new_sequence()
        self.name = pool.ranks.new_name()
        self.limits = limits
        self.head = Head()
        self.gaps = 0
        self._release = weakref.finalize(self, pool.drop, self.sequence)

    @property
    def position(self) -> int:
        """How many tokens there are."""
        self.check_open()
        return self.pool.end(self.sequence)

    def check_open(self) -> None:
        if not self._release.alive:
            raise CacheError("the prompt cache is closed")

    def close(self) -> None:
        """Give the cells back that no fork shares: at once, or after the forward under way."""
        try:
            self._release()
        except BaseException:
            # An interrupted release is dead, and would not be tried again. To release twice is harmless.
            if not self._release.alive:
                self.pool.drop(self.sequence)
            raise
        self.pool.free_dropped()

    def fork(self) -> Conversation:
        """Another conversation with the same tokens. Copies no array."""
        self.check_open()
        other = Conversation(self.pool, self.limits)
        self.pool.copy(self.sequence, other.sequence)
        other.head, other.gaps = self.head, self.gaps
        return other

    def moved(self, pool: Pool) -> Conversation:
        """The same in another pool of the model, which stores as it does."""
        other = Conversation(pool, self.limits)
        snapshots = [cache._snapshot(self.sequence) for cache in self.pool.caches]
        pool.restore(other.sequence, snapshots)
        pool.compute_all()
        other.head, other.gaps = self.head, self.gaps
        return other

    def check_resume(self, position: int) -> None:
        """Raise NotSupportedError unless the tokens from `position` on can be dropped."""
        if not self.pool.can_resume(self.sequence, position):
            raise NotSupportedError(
                f"cannot go back from {self.position} tokens to position {position}: what a token there "
                f"needs is not held; the newest position before it to go on from is "
                f"{self.pool.resume_point(self.sequence, position)}"
            )

    def rewind_to(self, position: int) -> None:
        """Drop the tokens from `position` on. Raises NotSupportedError where that cannot be done."""
        self.pool.commit(self.plan_rewind(position))

    def plan_rewind(self, position: int, gaps: int = 0) -> Plan:
        """Plan what `rewind_to` does; `gaps` more where it makes room for tokens. Raises as it."""
        self.check_resume(position)
        plans = self.pool.plan_truncate(self.sequence, position)
        return JointPlan([*plans, HeadPlan(self, self.head.cut(position), gaps)])

    def remove(self, begin: int, end: int) -> None:
        """Take out [begin, end), which are followed by others.

        Raises:
            NotSupportedError: the model's tokens cannot be moved, or what the next token sees
                would not be held.
        """
        pool, scheme, gap = self.pool, self.pool.scheme, end - begin
        if pool.layout.is_recurrent:
            raise NotSupportedError(
                f"removing [{begin}, {end}) of {self.position} tokens: "
                "a recurrent state cannot forget tokens that later ones were added to"
            )
        if scheme.refusal:
            raise NotSupportedError(f"removing [{begin}, {end}) of {self.position} tokens: {scheme.refusal}")
        if not scheme.ahead:
            pool.commit(self._plan_tail(begin, end))
            return
        plan = self._plan_head(begin, end)
        pool.ranks.ready()
        if self.head.lead + gap > FARTHEST:
            # Only now, as nothing changes where the removal is refused.
            self._renormalize()
            plan = self._plan_head(begin, end)
        pool.apply(plan)

    def has_room(self, n: int) -> bool:
        """Whether n more tokens are within the capacity."""
        return self.limits.capacity is None or self.position + n <= self.limits.capacity

    def block(self, n: int) -> int | None:
        """How many tokens at once the model should be given of n that are more than a shift makes room for.

        Half the room leaves each block as much to look back at. None where n tokens fit, or never will.
        """
        capacity, overflow, sinks, _ = self.limits
        if capacity is None or overflow == "error" or self.has_room(n) or n <= capacity - sinks:
            return None
        return max(1, (capacity - sinks) // 2)

    def check_room(self, n: int, early: bool) -> None:
        """Raise CacheFullError where n tokens find no room, and a shift would make none; see `make_room`."""
        if self.has_room(n):
            return
        position, (capacity, overflow, sinks, _) = self.position, self.limits
        assert capacity is not None
        free, sinks = capacity - position, min(sinks, position)
        if overflow == "error":
            raise CacheFullError(n, free, capacity, "remove or rewind tokens first")
        if n > capacity - sinks:
            raise CacheFullError(n, capacity - sinks, capacity, "feed smaller blocks")
        if not early and not self.pool.scheme.ahead:
            raise CacheFullError(n, free, capacity, "this model can make room only when it is called itself")

    def make_room(self, n: int, early: bool) -> None:
        """Make room for n tokens, before anything is computed.

        Args:
            early: the model has not read its offset yet, so that it may still change.

        Raises:
            CacheFullError: there is none, and none can be made.
        """
        if self.has_room(n):
            return
        self.check_room(n, early)
        position, (capacity, _, sinks, _) = self.position, self.limits
        assert capacity is not None
        free, sinks = capacity - position, min(sinks, position)
        drop = max((position - sinks) // 2, n - free)
        try:
            if sinks + drop < position:
                self.remove(sinks, sinks + drop)
            else:
                self.pool.commit(self.plan_rewind(sinks, gaps=1))
        except NotSupportedError as error:
            raise CacheFullError(n, free, capacity, f"no shift makes room: {error}") from error

    def _plan_head(self, begin: int, end: int) -> Plan:
        """A removal that rotates what is before it."""
        pool, scheme, lead = self.pool, self.pool.scheme, self.head.lead
        new_lead = lead + end - begin
        plans: list[Plan] = []
        pieces = {}
        for kind, cache in pool.positional():
            removal = remove_range(cache._table, self.sequence, begin, end, cache._rule, rebase_head=True)
            source = removal.rebased.source if removal.rebased else ()
            is_packed = any(span.segment in cache._table.packed for span in source)
            codecs = cache._store.codecs if is_packed else lambda leaf: (None, None)
            rebase = HeadRebase(scheme, source, lead, new_lead, self.head.pieces.get(kind, ()), codecs)
            plans.append(cache._plan_edit(removal, rebase))
            pieces[kind] = rebase.pieces
        return JointPlan([*plans, HeadPlan(self, Head(new_lead, pieces), gaps=1)])

    def _plan_tail(self, begin: int, end: int) -> Plan:
        """A removal that rotates what is after it."""
        rebase = self._by(begin - end)
        plans = []
        for _, cache in self.pool.positional():
            removal = remove_range(cache._table, self.sequence, begin, end, cache._rule)
            plans.append(cache._plan_edit(removal, rebase))
        return JointPlan([*plans, HeadPlan(self, self.head, gaps=1)])

    def _renormalize(self) -> None:
        """Rotate everything back, so that offsets equal positions again."""
        rebase = self._by(-self.head.lead)
        plans = [
            cache._plan_edit(rebase_all(cache._table, self.sequence, -self.head.lead), rebase)
            for _, cache in self.pool.positional()
            if cache._table[self.sequence].spans
        ]
        self.pool.apply(JointPlan([*plans, HeadPlan(self, Head())]))

    def _by(self, offset: int) -> Rebase:
        rotations = self.pool.scheme.rotations

        def rebase(leaf: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            return rebased(rotations[leaf], keys, values, offset)

        return rebase


class HeadPlan(Plan):
    """Another head and more gaps, for what happens to the cells at the same time."""

    def __init__(self, conversation: Conversation, head: Head, gaps: int = 0) -> None:
        self._conversation = conversation
        self._before = conversation.head, conversation.gaps
        self._after = head, conversation.gaps + gaps

    def arrays(self) -> Iterable[mx.array]:
        return self._after[0].arrays

    def make(self) -> None:
        self._conversation.head, self._conversation.gaps = self._after

    def unmake(self) -> None:
        self._conversation.head, self._conversation.gaps = self._before
