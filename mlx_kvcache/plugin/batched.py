"""A model's pass over several sequences as the rows of one input.

Where the model takes handles, each row attends to its own history. For others the histories are
gathered into a rectangle: padded on the left, so that the new tokens end them all, with a mask
that hides the padding. Nothing of that is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays.mask import Ints, Mask, positions_of
from ..caches.parts import Part
from ..caches.step import Step
from ..cells.rules import Causal, Rule, visible
from .conversation import Conversation
from .forward import Forward, History, newest, padded_state, store
from .layout import Leaf
from .padding import Columns
from .pool import Pool


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
