"""A model's pass over the next tokens: what each of its caches is given, and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..arrays.mask import Mask, array_mask, positions_of
from ..batch import Batch
from ..caches.attend import attend
from ..caches.keyvalue import Attending
from ..caches.recurrent import Arrays, filter_none
from ..caches.step import Step
from ..cells.rules import Causal, Chunk, Rule, Window
from ..errors import CacheError
from .conversation import Conversation
from .layout import Leaf
from .padding import Columns
from .pool import Pool
from .ragged import Ragged, RaggedMask

History = tuple[mx.array, mx.array]
"""Keys and values (B, n_kv_heads, S, head_dim)."""


class Forward(ABC):
    """The next n tokens of some sequences, which `start` takes into all caches of their pool.

    Args:
        columns: for each sequence, which of the n columns of the model's input are its tokens.
        is_ragged: the model is given handles for histories.

    Attributes:
        begins: positions of the first of them.
        written: for each leaf, by index, whether it has stored its own.
        asked: indices of the leaves that have been asked for a mask.
        advanced: indices of the recurrences that have said that they read their columns.
    """

    def __init__(
        self,
        pool: Pool,
        conversations: Sequence[Conversation],
        columns: Sequence[Columns],
        n: int,
        is_ragged: bool,
    ) -> None:
        self.pool = pool
        self.is_ragged = is_ragged
        self.conversations = conversations
        self.columns = columns
        self.n = n
        self.begins = [conversation.position for conversation in conversations]
        # A set would grow, layer by layer, at every step.
        self.written = bytearray(len(pool.leaves))
        self.asked: set[int] = set()
        self.advanced: set[int] = set()
        self._plan = pool.plan_forward(self._batch())
        self._kinds = pool.kinds
        self._caches: tuple[Any, ...] = pool.caches
        self._steps: list[Step | None] = []
        self._states: dict[int, list[mx.array | None]] = {}

    def start(self) -> None:
        """Take the tokens in. What interrupts that can leave them there: `undo` takes them out."""
        self._plan.commit()
        self._steps = [getattr(cache, "_step", None) for cache in self._caches]

    def update(self, leaf: Leaf, keys: mx.array, values: mx.array) -> Any:
        """Store a leaf's K and V (B, n_kv_heads, n, head_dim) and return what its tokens see."""
        step = self.step(leaf)
        if not self.is_ragged:
            return self._exchange(step, leaf, keys, values)
        step.put(leaf.index, self._tokens(keys), self._tokens(values))
        return self._handles(leaf)

    def history(self, leaf: Leaf) -> Any:
        """What `update` returned."""
        step = self.step(leaf)
        step.check_put(leaf.index)
        return self._handles(leaf) if self.is_ragged else self._arrays(step, leaf)

    def mask(self, leaf: Leaf, return_array: bool, window_size: int | None) -> Any:
        """Who of the n tokens sees which of a leaf's history."""
        step = self.step(leaf)
        rule = narrowed(leaf.rule, window_size)
        if not self.is_ragged:
            return self._mask(step, leaf, rule, return_array)
        sees_all = rule == leaf.rule and self.n == 1 and not return_array
        return None if sees_all else RaggedMask(leaf, window_size)

    def attend(
        self, leaf: Leaf, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention of queries (B, n_heads, n, head_dim) to a leaf's history, for which it gave handles."""
        step = self.step(leaf)
        if isinstance(mask, RaggedMask):
            rule = narrowed(mask.leaf.rule, mask.window_size)
            mask = None if rule == leaf.rule else self._array_mask(step, rule)
        if isinstance(mask, mx.array):
            keys, values = self._arrays(step, leaf)
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        given = Attending(self._tokens(queries), None, None, scale, sinks)
        return self._rows(attend(step, leaf.index, given))

    def state(self, leaf: Leaf) -> list[mx.array | None]:
        """A recurrence's arrays, (B, ...) each: before these tokens, until it is changed in place."""
        if leaf.index not in self._states:
            self._states[leaf.index] = self._read(leaf)
        return self._states[leaf.index]

    def finish(self) -> None:
        """Keep what the recurrences have become."""
        for index, arrays in self._states.items():
            self._write(self.pool.leaves[index], arrays)

    def undo(self) -> None:
        """Take the tokens out again."""
        self._plan.undo()

    def arrays(self) -> list[mx.array]:
        """What the tokens have written: buffers of keys and values, and the recurrences' new states."""
        written = [array for step in self._steps if isinstance(step, Step) for array in step.arrays]
        for index in self._states:
            for conversation in self.conversations:
                written += filter_none(newest(conversation, self.pool.leaves[index]))
        return written

    def step(self, leaf: Leaf) -> Step:
        """The step of a leaf's cache. Raises CacheError if another forward has begun since."""
        kind = self._kinds[leaf.index]
        step = self._steps[kind]
        is_current: bool = self._caches[kind]._step is step
        if step is None or not is_current:
            raise CacheError("another prompt cache of the same pool has been used in the middle of a forward")
        return step

    def _handles(self, leaf: Leaf) -> tuple[Ragged, Ragged]:
        handle = Ragged(self, leaf)
        return handle, handle

    def _batch(self) -> Batch | None:
        """The tokens; None where there is only padding."""
        positions: list[int] = []
        sequences: list[int] = []
        for conversation, begin, (first, stop) in zip(
            self.conversations, self.begins, self.columns, strict=True
        ):
            positions += range(begin, begin + stop - first)
            sequences += [conversation.sequence] * (stop - first)
        return Batch(positions, sequences) if positions else None

    @abstractmethod
    def _tokens(self, array: mx.array) -> mx.array:
        """The model's rows (B, heads, n, dim) as those of the batch, (1, heads, tokens, dim)."""

    @abstractmethod
    def _rows(self, tokens: mx.array) -> mx.array:
        """The other way round, with zeros for padding."""

    @abstractmethod
    def _exchange(self, step: Step, leaf: Leaf, keys: mx.array, values: mx.array) -> History:
        """Store a leaf's K and V, and its history as arrays."""

    @abstractmethod
    def _arrays(self, step: Step, leaf: Leaf) -> History:
        """A leaf's history as arrays, after it has been stored."""

    @abstractmethod
    def _mask(self, step: Step, leaf: Leaf, rule: Rule, return_array: bool) -> Mask:
        """The mask for a history as arrays."""

    @abstractmethod
    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        """The same as an array, by any rule."""

    @abstractmethod
    def _read(self, leaf: Leaf) -> list[mx.array | None]: ...

    @abstractmethod
    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None: ...


class SingleForward(Forward):
    """One sequence, as the only row of the model's input.

    Where its keys lie in several runs, a model that takes handles attends to the runs as they
    are, instead of to copies of them.
    """

    def __init__(self, conversation: Conversation, n: int, is_ragged: bool) -> None:
        super().__init__(conversation.pool, (conversation,), ((0, n),), n, is_ragged)

    def again(self) -> bool:
        """Take in as many tokens more, if nothing has happened since these; else False, and nothing."""
        made = self._plan.made
        try:
            if self.is_ragged or not self._plan.again():
                return False
            self.begins = [self.begins[0] + self.n]
            self.written = bytearray(len(self.pool.leaves))
            self.asked.clear()
        except BaseException:
            if self._plan.made != made:
                self._plan.undo()
            raise
        return True

    def update(self, leaf: Leaf, keys: mx.array, values: mx.array) -> Any:
        if self.is_ragged:
            return super().update(leaf, keys, values)
        return self.step(leaf).exchange(leaf.index, keys, values)

    def _tokens(self, array: mx.array) -> mx.array:
        return array

    def _rows(self, tokens: mx.array) -> mx.array:
        return tokens

    def _exchange(self, step: Step, leaf: Leaf, keys: mx.array, values: mx.array) -> History:
        return step.exchange(leaf.index, keys, values)

    def _arrays(self, step: Step, leaf: Leaf) -> History:
        return step.history(leaf.index, step.parts[0])

    def _mask(self, step: Step, leaf: Leaf, rule: Rule, return_array: bool) -> Mask:
        if rule == leaf.rule:
            mask = step.own_mask(step.parts[0])
            if mask is None or not (return_array and isinstance(mask, str)):
                return mask
        return self._array_mask(step, rule)

    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        part = step.parts[0]
        queries, keys = positions_of([(part.begin, part.end)]), positions_of(part.ranges)
        return array_mask(rule, queries, keys)

    def _batch(self) -> Batch:
        return Batch.run(self.conversations[0].sequence, self.begins[0], self.n)

    def _read(self, leaf: Leaf) -> list[mx.array | None]:
        return padded_state(newest(self.conversations[0], leaf), leaf.slots)

    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None:
        store(self.conversations[0], leaf, tuple(arrays))


def narrowed(rule: Rule | None, window_size: int | None) -> Rule:
    """The rule of a leaf, for a mask that hides all but the newest `window_size` tokens."""
    assert rule is not None
    if window_size is None or isinstance(rule, Chunk):
        return rule
    if isinstance(rule, Causal):
        return Window(window_size)
    return Window(min(rule.size, window_size), rule.sinks)


def newest(conversation: Conversation, leaf: Leaf) -> Arrays:
    """The arrays of a recurrence after a conversation's last token; () where there are none."""
    return conversation.pool.recurrent(leaf).newest(leaf.index, conversation.sequence)


def store(conversation: Conversation, leaf: Leaf, arrays: Arrays) -> None:
    """Make these the arrays of a recurrence after the tokens of the forward."""
    conversation.pool.recurrent(leaf)._put(leaf.index, arrays, conversation.sequence, None)


def padded_state(arrays: Arrays, slots: int) -> list[mx.array | None]:
    """One array or None for each slot, also where there are none yet."""
    return list(arrays) if arrays else [None] * slots
