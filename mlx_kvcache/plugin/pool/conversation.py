"""Conversations: sequences of a pool with a capacity, which can be rewound, edited, forked and shifted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple

import mlx.core as mx

from ...arguments import whole
from ...caches.interface import Recurrent
from ...caches.plan import JointPlan, Plan
from ...cells.edits import graft, rebase_all, remove_range
from ...errors import CacheError, CacheFullError, NotSupportedError
from ...storage.buffers import Rebase
from ..rope.axes import NO_DELTAS
from ..rope.rebase import Head, HeadRebase, rebased
from .pool import Checkpoints, Pool

Overflow = Literal["error", "shift"]

FARTHEST = 1 << 16
"""Largest lead of a head. Beyond it float32 angles lose precision, so all keys are re-based to lead 0."""


class Limits(NamedTuple):
    """The maximum length of a conversation and how far it can be rewound.

    Attributes:
        capacity: maximum number of tokens; None for no limit.
        overflow: whether a full conversation raises CacheFullError or shifts.
        sinks: number of first tokens that a shift never removes.
        rewind: number of newest tokens that windows, chunks and recurrent layers can always drop.
        checkpoints: maximum number of older states that recurrent layers keep.
        checkpoint_bytes: maximum number of bytes of such states in all conversations of a pool; None for
            no limit.
    """

    capacity: int | None = None
    overflow: Overflow = "error"
    sinks: int = 0
    rewind: int = 64
    checkpoints: int = Checkpoints().most
    checkpoint_bytes: int | None = Checkpoints().nbytes

    def checked(self) -> Limits:
        """Return the validated limits, with numbers as plain ints.

        Raises:
            ValueError: a limit is out of range, or has no effect without another one.
            TypeError: a limit is not an integer.
        """
        capacity, overflow, sinks, rewind, checkpoints, checkpoint_bytes = self
        if capacity is not None:
            (capacity,) = whole(1, capacity=capacity)
        if overflow not in ("error", "shift"):
            raise ValueError(f'overflow must be "error" or "shift", got {overflow!r}')
        rewind, sinks, checkpoints = whole(rewind=rewind, sinks=sinks, checkpoints=checkpoints)
        if checkpoint_bytes is not None:
            (checkpoint_bytes,) = whole(checkpoint_bytes=checkpoint_bytes)
        if capacity is not None and sinks >= capacity:
            raise ValueError(f"sinks must be below the capacity of {capacity}, got {sinks}")
        if overflow == "shift" and capacity is None:
            raise ValueError('overflow="shift" needs a capacity, such as capacity=4096')
        if sinks and overflow != "shift":
            raise ValueError(
                f'sinks={sinks} is the number of first tokens that a shift keeps: add overflow="shift" and '
                "a capacity. The number of tokens that a sliding window keeps is set by the model"
            )
        return Limits(capacity, overflow, sinks, rewind, checkpoints, checkpoint_bytes)


class Graft(NamedTuple):
    """The tokens [begin, end) of a conversation, which wait to join another one at `position`."""

    position: int
    source: Conversation
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


class Conversation:
    """A sequence of a pool with limits.

    Call its methods between forwards. A method that raises changes nothing.

    Attributes:
        gaps: how many times tokens were removed from before others. Tokens after a gap were computed
            while the removed ones were visible.
        waiting: tokens of other conversations that join this one as soon as it has grown to their
            positions, by rising position.
        text: the tokens of a splice, from the first on; None if there was none.
    """

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self.pool = pool
        self.sequence = pool.new_sequence()
        self.name = pool.ranks.new_name()
        self.limits = limits
        self.head = Head()
        self.gaps = 0
        self.waiting: tuple[Graft, ...] = ()
        self.text: tuple[int, ...] | None = None
        self._release = weakref.finalize(self, pool.drop, self.sequence)

    @property
    def position(self) -> int:
        """The number of tokens."""
        self.check_open()
        return self.pool.end(self.sequence)

    def check_open(self) -> None:
        if not self._release.alive:
            raise CacheError("the prompt cache is closed")

    def close(self) -> None:
        """Release the cells that no fork shares, at once or after the running forward."""
        try:
            self._release()
        except BaseException:
            # An interrupted finalizer does not run again. Dropping a sequence twice is harmless.
            if not self._release.alive:
                self.pool.drop(self.sequence)
            raise
        self.pool.free_dropped()

    def next_position(self, tokens: int) -> int:
        """The position that the model is told for a token of text after some tokens."""
        return tokens + self.head.lead + self.head.deltas.at(tokens)

    def fork(self) -> Conversation:
        """Return another conversation with the same tokens. Copies no arrays."""
        self.check_open()
        other = Conversation(self.pool, self.limits)
        self.pool.copy(self.sequence, other.sequence)
        other.head, other.gaps = self.head, self.gaps
        other.waiting, other.text = self.waiting, self.text
        return other

    def moved(self, pool: Pool) -> Conversation:
        """Return a copy of the conversation in another pool of the model."""
        other = Conversation(pool, self.limits)
        snapshots = [cache._snapshot(self.sequence) for cache in self.pool.caches]
        pool.restore(other.sequence, snapshots)
        pool.compute_all()
        other.head, other.gaps, other.text = self.head, self.gaps, self.text
        other.waiting = tuple(own._replace(source=own.source.moved(pool)) for own in self.waiting)
        return other

    def check_resume(self, position: int) -> None:
        """Raise NotSupportedError if the tokens from `position` on cannot be dropped."""
        if not self.pool.can_resume(self.sequence, position):
            raise NotSupportedError(
                f"cannot rewind from {self.position} tokens to position {position}: the tokens or states "
                f"needed there are no longer held; the newest position before it to rewind to is "
                f"{self.pool.resume_point(self.sequence, position)}"
            )

    def rewind_to(self, position: int) -> None:
        """Drop the tokens from `position` on. Raises NotSupportedError if they cannot be dropped."""
        self.pool.commit(self.plan_rewind(position))

    def plan_rewind(self, position: int, gaps: int = 0) -> Plan:
        """Plan `rewind_to`; `gaps` is added to the conversation's. Raises NotSupportedError like it."""
        self.check_resume(position)
        plans = self.pool.plan_truncate(self.sequence, position)
        return JointPlan([*plans, HeadPlan(self, self.head.cut(position), gaps)])

    def remove(self, begin: int, end: int, recurrent: Recurrent = "refuse") -> None:
        """Remove the tokens [begin, end), which must not be the last ones.

        Args:
            recurrent: what happens to recurrent states, which contain the removed tokens; see
                `PromptCache.remove`.

        Raises:
            NotSupportedError: the positions of the later tokens cannot be changed, the next token would see
                tokens that the cache does not hold, or recurrent states cannot be changed in this way.
            CacheError: tokens of a splice wait to join.
        """
        if self.waiting:
            raise CacheError(
                f"cannot remove [{begin}, {end}) of {self.position} tokens: tokens of a splice wait to join "
                f"at position {self.waiting[0].position}; compute the rest of the splice first, "
                "or call end_splice"
            )
        pool, scheme = self.pool, self.pool.scheme
        refusal = scheme.refusal
        if pool.has_states:
            if recurrent == "refuse":
                refusal = (
                    "the model has recurrent layers, whose states contain these tokens; "
                    'pass recurrent="keep" to let the states go on knowing them, or recurrent="replay" to '
                    "compute the states of the newest tokens without them"
                )
            elif not scheme.ahead and not pool.can_move_states:
                refusal = "its recurrent states contain the positions of tokens, which would change"
        if refusal:
            raise NotSupportedError(f"cannot remove [{begin}, {end}) of {self.position} tokens: {refusal}")
        if not scheme.ahead:
            pool.commit(self._plan_tail(begin, end, recurrent))
            return
        plan = self._plan_head(begin, end, recurrent)
        pool.ranks.ready()
        if self.head.lead + end - begin > FARTHEST and pool.can_move_states:
            # After planning once, so that a removal that is refused changes nothing.
            self._renormalize()
            plan = self._plan_head(begin, end, recurrent)
        pool.apply(plan)

    def check_joins(self, source: Conversation, position: int, begin: int, end: int) -> None:
        """Raise NotSupportedError if tokens [begin, end) of another conversation cannot join at `position`.

        Windows are not checked.
        """
        pool = self.pool
        refusal: str | None = None
        if pool.has_states:
            refusal = "the model has recurrent layers, whose states cannot be joined"
        elif self.head.deltas != NO_DELTAS or source.head.deltas != NO_DELTAS:
            refusal = "one of them has pictures, whose tokens have positions of their own"
        elif position + self.head.lead != begin + source.head.lead:
            refusal = pool.scheme.refusal
        if refusal:
            raise NotSupportedError(
                f"cannot append tokens [{begin}, {end}) of another conversation at position {position}: "
                f"{refusal}"
            )

    def graft(self, source: Conversation, begin: int, end: int) -> None:
        """Append the tokens [begin, end) of another conversation of the pool.

        Their keys are re-based once from what is stored, or shared if their positions stay.

        Raises:
            NotSupportedError: the tokens cannot be moved, or a window lacks tokens that the next one sees.
        """
        self.check_joins(source, self.position, begin, end)
        offset = self.position + self.head.lead - begin - source.head.lead
        plans: list[Plan] = []
        for _, cache in self.pool.positional():
            own = graft(cache._table, source.sequence, begin, end, self.sequence, cache._rule, offset)
            plans.append(cache._plan_edit(own, self._by(offset)))
        self.pool.commit(JointPlan(plans))

    def join_waiting(self, early: bool) -> None:
        """Append the waiting tokens whose turn it is.

        Args:
            early: whether the offset may still change, because the model has not read it yet.
        """
        while self.waiting and self.waiting[0].position == self.position:
            if not early:
                raise CacheError(
                    "tokens of a splice are about to join, but layers that are driven by hand may have read "
                    "their offset already: call the model"
                )
            first, *others = self.waiting
            with self.pool.ranks.together(f"join tokens to conversation {self.name}"):
                self.graft(first.source, first.begin, first.end)
            self.waiting = tuple(others)

    def edges(self, n: int) -> list[int]:
        """Return after how many of the next n tokens, fewer than all, others join."""
        if not self.waiting:
            return []
        position, edges = self.position, list[int]()
        for waiting in self.waiting:
            # Tokens that joined before count for positions, but are not among the n.
            edges.append(waiting.position - position)
            position += waiting.length
        return [edge for edge in dict.fromkeys(edges) if 0 < edge < n]

    def has_room(self, n: int) -> bool:
        """Whether n more tokens fit the capacity."""
        return self.limits.capacity is None or self.position + n <= self.limits.capacity

    def block(self, n: int) -> int | None:
        """Return the block size for n tokens that are too many for one shift.

        A block is half of the capacity without sinks, so each block can see as many tokens before it.
        Returns None if n tokens fit, need only one shift, or may not shift.
        """
        capacity, overflow, sinks, *_ = self.limits
        if capacity is None or overflow == "error" or self.has_room(n) or n <= capacity - sinks:
            return None
        return max(1, (capacity - sinks) // 2)

    def reply_room(self, prompt: int, ahead: int = 0) -> int:
        """Return the maximum number of tokens in a reply to a prompt.

        Args:
            prompt: the number of new tokens in the prompt.
            ahead: tokens computed beyond the reply, such as a draft model's.

        Raises:
            CacheFullError: there is no room for one.
        """
        capacity, overflow, *_ = self.limits
        if capacity is None or overflow != "error":
            return sys.maxsize
        position = self.position
        room = capacity - position - prompt - ahead
        if room < 1:
            hint = (
                f"the prompt has {position + prompt} tokens and leaves no room for a reply; shorten it, "
                'raise the capacity, or use overflow="shift"'
            )
            raise CacheFullError(prompt + ahead + 1, capacity - position, capacity, hint)
        return room

    def check_room(self, n: int, early: bool) -> None:
        """Raise CacheFullError if n tokens do not fit and a shift cannot make room; see `make_room`."""
        if self.has_room(n):
            return
        position, (capacity, overflow, sinks, *_) = self.position, self.limits
        assert capacity is not None
        free, sinks = capacity - position, min(sinks, position)
        if overflow == "error":
            raise CacheFullError(n, free, capacity, "remove or rewind tokens first")
        if n > capacity - sinks:
            raise CacheFullError(n, capacity - sinks, capacity, "feed smaller blocks")
        if not early and not self.pool.scheme.ahead:
            raise CacheFullError(n, free, capacity, "this model can make room only at the start of its call")

    def make_room(self, n: int, early: bool) -> None:
        """Make room for n tokens by a shift if they do not fit, before anything is computed.

        Args:
            early: whether the offset may still change, because the model has not read it yet.

        Raises:
            CacheFullError: they do not fit and a shift is not possible.
        """
        if self.has_room(n):
            return
        self.check_room(n, early)
        position, (capacity, _, sinks, *_) = self.position, self.limits
        assert capacity is not None
        free, sinks = capacity - position, min(sinks, position)
        drop = max((position - sinks) // 2, n - free)
        begin = self.head.deltas.border(sinks)
        end = self.head.deltas.border(begin + drop)
        if begin + n > capacity:
            rest = f"which has {begin - sinks} more tokens; raise the capacity, or use other sinks"
            raise CacheFullError(n, free, capacity, f"the {sinks} sinks end inside a picture, {rest}")
        try:
            if end < position:
                self.remove(begin, end, recurrent="keep")
            else:
                self.pool.commit(self.plan_rewind(begin, gaps=1))
        except NotSupportedError as error:
            raise CacheFullError(n, free, capacity, f"cannot shift: {error}") from error

    def _plan_states(self, begin: int, end: int, recurrent: Recurrent) -> list[Plan]:
        """Plan a removal in the recurrent layers."""
        if not self.pool.layout.is_recurrent:
            return []
        return [self.pool.recurrent._plan_remove(self.sequence, begin, end, recurrent)]

    def _plan_head(self, begin: int, end: int, recurrent: Recurrent) -> Plan:
        """Plan a removal that re-bases the tokens before it."""
        pool, scheme, lead = self.pool, self.pool.scheme, self.head.lead
        deltas, gap = self.head.deltas.without(begin, end)
        new_lead = lead + gap
        plans = self._plan_states(begin, end, recurrent)
        pieces = {}
        for kind, cache in pool.positional():
            removal = remove_range(cache._table, self.sequence, begin, end, cache._rule, rebase_head=True)
            source = removal.moves[0].pieces if removal.moves else ()
            is_packed = any(span.segment in cache._table.packed for span in source)
            codecs = cache._store.codecs if is_packed else lambda leaf: (None, None)
            rebase = HeadRebase(scheme, source, lead, new_lead, self.head.pieces.get(kind, ()), codecs)
            plans.append(cache._plan_edit(removal, rebase))
            pieces[kind] = rebase.pieces
        return JointPlan([*plans, HeadPlan(self, Head(new_lead, pieces, deltas), gaps=1)])

    def _plan_tail(self, begin: int, end: int, recurrent: Recurrent) -> Plan:
        """Plan a removal that re-bases the tokens after it."""
        deltas, gap = self.head.deltas.without(begin, end)
        rebase = self._by(-gap)
        plans = self._plan_states(begin, end, recurrent)
        for _, cache in self.pool.positional():
            removal = remove_range(cache._table, self.sequence, begin, end, cache._rule)
            plans.append(cache._plan_edit(removal, rebase))
        return JointPlan([*plans, HeadPlan(self, replace(self.head, deltas=deltas), gaps=1)])

    def _renormalize(self) -> None:
        """Re-base all keys so that offsets equal positions again."""
        rebase = self._by(-self.head.lead)
        plans = [
            cache._plan_edit(rebase_all(cache._table, self.sequence, -self.head.lead), rebase)
            for _, cache in self.pool.positional()
            if cache._table[self.sequence].spans
        ]
        self.pool.apply(JointPlan([*plans, HeadPlan(self, Head(deltas=self.head.deltas))]))

    def _by(self, offset: int) -> Rebase:
        rotations = self.pool.scheme.rotations

        def rebase(leaf: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            return rebased(rotations[leaf], keys, values, offset)

        return rebase


class HeadPlan(Plan):
    """Replaces a conversation's head and adds gaps, together with a change of its cells."""

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
