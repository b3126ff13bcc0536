"""Which columns of the coming inputs are padding, as mlx-lm's `prepare` announces it.

A model's pass over the next tokens: what each of its caches is given, and gives.

A model's pass over several sequences as the rows of one input.

Where the model takes handles, each row attends to its own history. For others the histories are
gathered into a rectangle: padded on the left, so that the new tokens end them all, with a mask
that hides the padding. Nothing of that is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...attend.part import Attending, Part
from ...attend.sdpa import attend
from ...attend.step import Step
from ...batch import Batch
from ...caches.recurrent import Arrays, filter_none
from ...cells.visibility import Causal, Chunk, Rule, Window, visible
from ...errors import CacheError, NotSupportedError
from ...storage.masks import Ints, Mask, array_mask, positions_of
from ..hosts.handles import Ragged, RaggedMask
from ..hosts.layout import Leaf
from ..pool.conversation import Conversation
from ..pool.pool import Pool

Columns = tuple[int, int]
"""The columns [first, stop) of a row that are tokens; the others are padding."""


class Padding:
    """For each row: padding to come on the left, then tokens, then padding until `finalized`.

    It does not change: what happens makes another.
    """

    def __init__(self, rows: int) -> None:
        self.left = [0] * rows
        self.lengths: list[int] | None = None
        self._right: list[int] | None = None

    @property
    def is_announced(self) -> bool:
        """Whether any padding is to come."""
        return any(self.left) or self.lengths is not None or self._right is not None

    def prepared(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> Padding:
        """The same with more padding announced.

        Args:
            left: columns of padding to come first.
            lengths: tokens that follow, over all inputs until `finalized`.
            right: where `lengths` is not given, columns of padding at the end of the next input.

        Raises:
            ValueError: not one number for each row, or a negative one.
        """
        for name, numbers in (("left_padding", left), ("lengths", lengths), ("right_padding", right)):
            if numbers is not None and (len(numbers) != len(self.left) or min(numbers) < 0):
                raise ValueError(f"{name}={list(numbers)}: {len(self.left)} numbers of 0 or more are needed")
        other = self._copy()
        if left is not None:
            other.left = [old + new for old, new in zip(self.left, left, strict=True)]
        if lengths is not None:
            other.lengths = list(lengths)
        elif right is not None:
            other._right = list(right)
        return other

    def finalized(self) -> Padding:
        """The same where what comes next is not padded on the right."""
        other = Padding(0)
        other.left = self.left
        return other

    def columns(self, n: int) -> list[Columns]:
        """Which of the next n columns are tokens, for each row."""
        result = []
        for row, left in enumerate(self.left):
            first = min(left, n)
            stop = n
            if self.lengths is not None:
                stop = min(n, first + self.lengths[row])
            elif self._right is not None:
                stop = max(first, n - self._right[row])
            result.append((first, stop))
        return result

    def passed(self, columns: Sequence[Columns]) -> Padding:
        """What is still to come after these columns have been computed."""
        if not self.is_announced:
            return self
        other = self._copy()
        other.left = [left - first for left, (first, _) in zip(self.left, columns, strict=True)]
        tokens = [stop - first for first, stop in columns]
        if self.lengths is not None:
            other.lengths = [rest - done for rest, done in zip(self.lengths, tokens, strict=True)]
        elif self._right is not None:
            other.lengths = [0] * len(tokens)
        return other

    def _copy(self) -> Padding:
        return self.filtered(range(len(self.left)))

    def filtered(self, keep: Sequence[int]) -> Padding:
        """The same for some of the rows."""
        chosen = Padding(0)
        chosen.left = [self.left[row] for row in keep]
        chosen.lengths = None if self.lengths is None else [self.lengths[row] for row in keep]
        chosen._right = None if self._right is None else [self._right[row] for row in keep]
        return chosen

    def extended(self, other: Padding) -> Padding:
        """The same with another's rows after these; padding on the right is announced anew after that."""
        joined = Padding(0)
        joined.left = self.left + other.left
        return joined


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


class BatchedForward(Forward):
    """Each row's tokens join its sequence; rows may be padded on either side.

    Where all is padding, the model is given its own columns back.
    """

    def __init__(
        self,
        pool: Pool,
        conversations: Sequence[Conversation],
        columns: Sequence[Columns],
        n: int,
        is_ragged: bool,
    ) -> None:
        super().__init__(pool, conversations, columns, n, is_ragged)
        self._is_full = all(span == (0, n) for span in columns)
        self._is_empty = all(first == stop for first, stop in columns)
        self._masks: dict[tuple[Rule, int], Mask] = {}

    def update(self, leaf: Leaf, keys: mx.array, values: mx.array) -> Any:
        return (keys, values) if self._is_empty else super().update(leaf, keys, values)

    def mask(self, leaf: Leaf, return_array: bool, window_size: int | None) -> Any:
        if self._is_empty:
            return mx.eye(self.n, dtype=mx.bool_)
        return super().mask(leaf, return_array, window_size)

    def _exchange(self, step: Step, leaf: Leaf, keys: mx.array, values: mx.array) -> History:
        step.put(leaf.index, self._tokens(keys), self._tokens(values))
        return self._arrays(step, leaf)

    def _arrays(self, step: Step, leaf: Leaf) -> History:
        """All rows' histories as they are stored, each ended by its columns; zeros stand for padding."""
        parts = self._parts(step)
        widest = max(part.earlier_size if part else 0 for part in parts)
        gathered: tuple[list[mx.array | None], list[mx.array | None]] = [], []
        for part, (first, stop) in zip(parts, self.columns, strict=True):
            histories = step.history(leaf.index, part) if part else (None, None)
            for own, rows in zip(histories, gathered, strict=True):
                if part is None or own is None:
                    rows.append(None)
                    continue
                before = part.earlier_size
                if before and first:
                    new = mx.pad(own[:, :, before:], _edges(first, 0))
                    own = mx.concatenate([own[:, :, :before], new], axis=2)
                left, right = widest - before + (0 if before else first), self.n - stop
                rows.append(mx.pad(own, _edges(left, right)) if left or right else own)
        keys, values = (_joined(rows) for rows in gathered)
        assert keys is not None and values is not None
        return keys, values

    def _mask(self, step: Step, leaf: Leaf, rule: Rule, return_array: bool) -> Mask:
        equal = self._is_full and len({part.size for part in step.parts}) == 1
        if equal and not return_array and rule == leaf.rule:
            if self.n == 1:
                return None
            if isinstance(rule, Causal):
                return "causal"
        key = rule, self.pool.kinds[leaf.index]
        if key not in self._masks:
            self._masks[key] = self._array_mask(step, rule)
        return self._masks[key]

    def _tokens(self, array: mx.array) -> mx.array:
        if self._is_full:
            rows, heads, n, dim = array.shape
            return array.swapaxes(0, 1).reshape(1, heads, rows * n, dim)
        tokens = [
            array[i : i + 1, :, first:stop] for i, (first, stop) in enumerate(self.columns) if first < stop
        ]
        return mx.concatenate(tokens, axis=2)

    def _rows(self, tokens: mx.array) -> mx.array:
        _, heads, _, dim = tokens.shape
        if self._is_full:
            return tokens.reshape(heads, len(self.columns), self.n, dim).swapaxes(0, 1)
        rows, start = [], 0
        for first, stop in self.columns:
            own = tokens[:, :, start : start + stop - first]
            rows.append(mx.pad(own, _edges(first, self.n - stop)))
            start += stop - first
        return mx.concatenate(rows)

    def _parts(self, step: Step) -> list[Part | None]:
        """For each row its part of the step; None where it is all padding."""
        parts = {part.sequence: part for part in step.parts}
        return [parts.get(conversation.sequence) for conversation in self.conversations]

    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        """(B, 1, n, S): who of a row's columns sees which of its history."""
        parts = self._parts(step)
        widest = max(part.earlier_size if part else 0 for part in parts)
        queries = np.full((len(parts), self.n), -1, np.int32)
        keys = np.full((len(parts), widest + self.n), -1, np.int32)
        for row, (part, (first, stop)) in enumerate(zip(parts, self.columns, strict=True)):
            if part is None:
                continue
            new: Ints = np.arange(part.begin, part.end, dtype=np.int32)
            queries[row, first:stop] = new
            keys[row, widest + first : widest + stop] = new
            if part.earlier_size:
                keys[row, widest - part.earlier_size : widest] = positions_of(part.earlier)
        q, k = mx.array(queries)[:, None, :, None], mx.array(keys)[:, None, None, :]
        seen: mx.array = visible(rule, q, k) & (k >= 0)
        if self._is_full:
            return seen
        # A padded column sees itself: an average over nothing would not be a number.
        itself = mx.arange(widest + self.n) == widest + mx.arange(self.n)[:, None]
        return seen | (itself & (q < 0))

    def _read(self, leaf: Leaf) -> list[mx.array | None]:
        rows = [padded_state(newest(conversation, leaf), leaf.slots) for conversation in self.conversations]
        return [_joined(slot) for slot in zip(*rows, strict=True)]

    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None:
        for row, (conversation, (first, stop)) in enumerate(
            zip(self.conversations, self.columns, strict=True)
        ):
            if first < stop:
                own = tuple(None if array is None else array[row : row + 1] for array in arrays)
                store(conversation, leaf, own)


def _edges(before: int, after: int) -> list[tuple[int, int]]:
    """Padding of tokens, in an array (1, heads, n, dim)."""
    return [(0, 0), (0, 0), (before, after), (0, 0)]


def _joined(rows: Sequence[mx.array | None]) -> mx.array | None:
    """Rows (1, ...) of one array as a batch; zeros stand for those that are not there yet."""
    like = next((row for row in rows if row is not None), None)
    if like is None:
        return None
    return mx.concatenate([mx.zeros_like(like) if row is None else row for row in rows])


class TokenForward(Forward):
    """The tokens of all sequences, one after the other, each as a row. Only handles stand for histories."""

    def __init__(
        self, pool: Pool, conversations: Sequence[Conversation], columns: Sequence[Columns], n: int
    ) -> None:
        super().__init__(pool, conversations, columns, n, is_ragged=True)

    def _tokens(self, array: mx.array) -> mx.array:
        return array.swapaxes(0, 2)

    def _rows(self, tokens: mx.array) -> mx.array:
        return tokens.swapaxes(0, 2)

    def _exchange(self, step: Step, leaf: Leaf, keys: mx.array, values: mx.array) -> History:
        raise _no_arrays()

    def _arrays(self, step: Step, leaf: Leaf) -> History:
        raise _no_arrays()

    def _mask(self, step: Step, leaf: Leaf, rule: Rule, return_array: bool) -> Mask:
        raise _no_arrays()

    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        raise _no_arrays()

    def _read(self, leaf: Leaf) -> list[mx.array | None]:
        raise _no_arrays()

    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None:
        raise _no_arrays()


def _no_arrays() -> NotSupportedError:
    return NotSupportedError("tokens that are rows of their own have no history or state in one piece")
