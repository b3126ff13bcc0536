"""One forward of a model: stores the new keys, values and states, and returns histories and masks.

The rows of the input are one sequence, several sequences, or single tokens of several sequences; see `Form`.
`Padding` keeps the columns that mlx-lm's `prepare` announces.

If the model accepts handles, each row attends to its own history. Otherwise the rows' histories are gathered
into one array, unless they lie in one already. It is padded on the left, so that all rows end with their new
tokens, and a mask hides the padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...attend.part import Attending, Part
from ...attend.sdpa import attend, attend_run, attend_stack
from ...attend.step import Step
from ...batch import Batch
from ...caches.recurrent import Arrays
from ...cells.visibility import Causal, Chunk, Rule, Window, visible
from ...errors import CacheError, NotSupportedError
from ...storage.masks import Ints, Mask, array_mask, positions_of
from ..hosts.handles import Ragged, RaggedMask
from ..hosts.layout import Leaf
from ..hosts.mixers import joined_outputs
from ..hosts.observe import Call
from ..pool.conversation import Conversation
from ..pool.pool import Pool

Columns = tuple[int, int]
"""The columns [first, stop) of a row that are tokens. The others are padding."""


class Padding:
    """The announced padding of each row: columns on the left, then tokens, then padding until `finalized`.

    Immutable: every method returns another object.

    Attributes:
        left: for each row, the columns of padding that come first.
        lengths: for each row, the tokens that follow, if that is announced.
        is_announced: whether any padding is still to come.
    """

    def __init__(
        self, left: list[int], lengths: list[int] | None = None, right: list[int] | None = None
    ) -> None:
        self.left = left
        self.lengths = lengths
        self._right = right
        self.is_announced = any(left) or lengths is not None or right is not None

    def prepared(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> Padding:
        """Add padding, one number for each row.

        Args:
            left: padding columns that come first.
            lengths: the number of tokens that follow, over all inputs until `finalized`.
            right: padding columns at the end of the next input. Ignored if `lengths` is given.

        Raises:
            ValueError: there is not one number for each row, or one is negative.
        """
        for name, numbers in (("left_padding", left), ("lengths", lengths), ("right_padding", right)):
            if numbers is not None and (len(numbers) != len(self.left) or min(numbers) < 0):
                raise ValueError(
                    f"{name} must be {len(self.left)} numbers of 0 or more, one for each row, "
                    f"got {list(numbers)}"
                )
        new_left, new_lengths, new_right = self.left, self.lengths, self._right
        if left is not None:
            new_left = [old + new for old, new in zip(self.left, left, strict=True)]
        if lengths is not None:
            new_lengths = list(lengths)
        elif right is not None:
            new_right = list(right)
        return Padding(new_left, new_lengths, new_right)

    def finalized(self) -> Padding:
        """End the padding on the right."""
        return Padding(self.left)

    def columns(self, n: int) -> list[Columns]:
        """For each row, the range of the next n columns that are tokens."""
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
        """The padding that is left after a forward of these columns."""
        left = [left - first for left, (first, _) in zip(self.left, columns, strict=True)]
        lengths, tokens = self.lengths, [stop - first for first, stop in columns]
        if lengths is not None:
            lengths = [rest - done for rest, done in zip(lengths, tokens, strict=True)]
        elif self._right is not None:
            lengths = [0] * len(tokens)
        return Padding(left, lengths, self._right)

    def filtered(self, keep: Sequence[int]) -> Padding:
        """The padding of some of the rows."""
        left = [self.left[row] for row in keep]
        lengths = None if self.lengths is None else [self.lengths[row] for row in keep]
        right = None if self._right is None else [self._right[row] for row in keep]
        return Padding(left, lengths, right)

    def extended(self, other: Padding) -> Padding:
        """Append another's rows. Padding on the right must be announced again afterwards."""
        return Padding(self.left + other.left)


History = tuple[mx.array, mx.array]
"""Keys and values (B, n_kv_heads, S, head_dim)."""

Form = Literal["single", "rows", "tokens"]
"""The rows of an input: one sequence without padding, one row for each sequence, or one for each token."""


class Forward:
    """A forward of n columns through all caches of a pool.

    Args:
        pool: the pool of the conversations.
        conversations: those that get new tokens.
        columns: for each conversation, the range of the n columns that are its tokens.
        n: the number of columns of the model's input. With `form` "tokens", the input has one column,
            and `columns` counts the rows of each conversation.
        form: what the rows of the input are. For "tokens", histories are handles only.
        is_ragged: return handles instead of arrays as histories.

    Attributes:
        begins: for each conversation, the position of its first new token.
        written: for each leaf, by index, whether it has written.
        asked: indices of the leaves that have asked for a mask.
        advanced: indices of the recurrences that have called `advance`.
        is_by_token: whether `form` is "tokens".
    """

    def __init__(
        self,
        pool: Pool,
        conversations: Sequence[Conversation],
        columns: Sequence[Columns],
        n: int,
        form: Form,
        is_ragged: bool,
    ) -> None:
        self.pool = pool
        self.conversations = conversations
        self.columns = columns
        self.n = n
        self.is_single = form == "single"
        self.is_ragged = is_ragged
        self.begins = [conversation.position for conversation in conversations]
        # Cheaper than a set, which would grow with every layer.
        self.written = bytearray(len(pool.leaves))
        self.asked: set[int] = set()
        self.advanced: set[int] = set()
        self.is_by_token = form == "tokens"
        self._is_full = all(span == (0, n) for span in columns)
        self._is_decoding = form != "single" and n == 1 and self._is_full
        self._is_empty = all(first == stop for first, stop in columns)
        self._masks: dict[tuple[Rule, int], Mask] = {}
        self._plan = pool.plan_forward(self._batch())
        self._kinds = pool.kinds
        self._caches: tuple[Any, ...] = pool.caches
        self._steps: list[Step | None] = []
        self._states: dict[int, list[mx.array | None]] = {}
        self._before: list[Mapping[int, Arrays]] | None = None
        self._noted: dict[int, dict[int, list[mx.array]]] = {}
        """For each recurrence, by leaf, and each of its modules what was noted of its newest tokens."""
        self._inside: dict[int, dict[int, list[mx.array | None]]] = {}
        """For each recurrence, by leaf, its arrays before some of the columns."""
        self._cuts: list[int] | None = None

    def start(self) -> None:
        """Add the tokens to all caches. After an interrupt, `undo` removes them."""
        self._plan.commit()
        self._steps = [getattr(cache, "_step", None) for cache in self._caches]

    @property
    def is_repeatable(self) -> bool:
        """Whether `again` may be called: rows that fill all columns, without states."""
        return (self.is_single or self._is_decoding) and not self._states

    def again(self) -> bool:
        """Repeat the forward for the next n tokens of each sequence if nothing changed in between.

        Returns False, and does nothing, otherwise.
        """
        made = self._plan.made
        try:
            if not self._plan.again():
                return False
            self.begins = [begin + self.n for begin in self.begins]
            self.written = bytearray(len(self.pool.leaves))
            self.asked.clear()
            self._masks.clear()
        except BaseException:
            if self._plan.made != made:
                self._plan.undo()
            raise
        return True

    def update(self, leaf: Leaf, keys: mx.array, values: mx.array) -> Any:
        """Store a leaf's keys and values (B, n_kv_heads, n, head_dim) and return its history.

        If all columns are padding, the history is the keys and values themselves.
        """
        if self._is_empty:
            return keys, values
        index = leaf.index
        kind = self._kinds[index]
        step = self._steps[kind]
        if step is None or self._caches[kind]._step is not step:
            step = self.step(leaf)  # raises
        if self.is_single:
            history = step.exchange(index, keys, values, not self.is_ragged)
            if history is not None:
                return history
        elif not (self._is_decoding and step.put_rows(index, keys, values)):
            step.put(index, self._tokens(keys), self._tokens(values))
        if not self.is_ragged:
            return self._arrays(step, leaf)
        handle = Ragged(self, leaf)
        return handle, handle

    def history(self, leaf: Leaf) -> Any:
        """The history that `update` returned."""
        step = self.step(leaf)
        step.written(leaf.index)
        if not self.is_ragged:
            return self._arrays(step, leaf)
        return Ragged(self, leaf), Ragged(self, leaf)

    def mask(self, leaf: Leaf, return_array: bool, window_size: int | None) -> Any:
        """The mask of the n columns for a leaf's history: None, "causal", an array or a handle."""
        if self._is_empty:
            return mx.eye(self.n, dtype=mx.bool_)
        step = self.step(leaf)
        rule = narrowed(leaf.rule, window_size)
        is_own = rule is leaf.rule or rule == leaf.rule
        if self.n == 1 and is_own and not return_array and (self.is_ragged or self.is_single):
            # A single token sees all that its rule lets be stored.
            return None
        if self.is_ragged:
            return RaggedMask(leaf, window_size)
        if is_own and self.is_single:
            mask = step.own_mask(step.parts[0])
            if not (return_array and isinstance(mask, str)):
                return mask
        elif is_own and not return_array and self._is_full and len({part.size for part in step.parts}) == 1:
            if self.n == 1:
                return None
            if isinstance(rule, Causal):
                return "causal"
        key = rule, self._kinds[leaf.index]
        if key not in self._masks:
            self._masks[key] = self._array_mask(step, rule)
        return self._masks[key]

    def attend(
        self, leaf: Leaf, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention of queries (B, n_heads, n, head_dim) to the history behind a leaf's handles."""
        step = self.step(leaf)
        if isinstance(mask, RaggedMask):
            rule = narrowed(mask.leaf.rule, mask.window_size)
            mask = None if rule == leaf.rule else self._array_mask(step, rule)
        if isinstance(mask, mx.array):
            keys, values = self._arrays(step, leaf)
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        if self.is_single and self.n == 1 and step.run and sinks is None:
            return attend_run(step, leaf.index, queries, scale)
        if self._is_decoding:
            if step.whole:
                return attend_stack(step, leaf.index, 0, queries, scale, sinks)
            given = Attending(queries.swapaxes(0, 2), None, None, scale, sinks)
            return attend(step, leaf.index, given).swapaxes(0, 2)
        given = Attending(self._tokens(queries), None, None, scale, sinks)
        return self._rows(attend(step, leaf.index, given))

    def state(self, leaf: Leaf) -> list[mx.array | None]:
        """A recurrence's arrays (B, ...), as before this forward. The model replaces items of this list."""
        state = self._states.get(leaf.index)
        if state is None:
            if self.is_by_token:
                raise _no_arrays()
            if self._before is None:
                recurrent = self.pool.recurrent
                self._before = [recurrent.newest_state(own.sequence) for own in self.conversations]
            rows = [padded_state(own.get(leaf.index, ()), leaf.slots) for own in self._before]
            state = rows[0] if self.is_single else [_joined(slot) for slot in zip(*rows, strict=True)]
            self._states[leaf.index] = state
        return state

    def run_mixer(
        self, leaf: Leaf, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the call of a module that is handed a recurrence, and note its inputs.

        Where a state inside the block is worth a checkpoint, the module is called for the tokens before it
        and again for the others.
        """
        mixers = self.pool.mixers.get(leaf.index)
        index = mixers.index(module) if mixers else None
        inputs = mixers.inputs(index, self.n, args, kwargs) if mixers and index is not None else None
        if mixers is None or index is None or inputs is None:
            return call(*args, **kwargs)
        noted = self._noted.setdefault(leaf.index, {})
        if self._cuts is None:
            self._cuts = cuts_of(self.pool, self.conversations, self.begins, self.n)
        cuts = () if mixers.is_nested else self._cuts
        if not cuts:
            noted[index] = inputs
            return call(*args, **kwargs)
        outputs, pieces, state = [], [], self.state(leaf)
        inside = self._inside.setdefault(leaf.index, {column: list(state) for column in cuts})
        edges = [0, *cuts, self.n]
        calls = mixers.pieces(index, edges, args, kwargs)
        for (begin, end), (own, named) in zip(itertools.pairwise(edges), calls, strict=True):
            before = list(state)
            outputs.append(call(*own, **named))
            if end < self.n:
                # Another module may share the state, so keep those arrays only that this one has replaced.
                for slot, (old, new) in enumerate(zip(before, state, strict=True)):
                    if new is not old:
                        inside[end][slot] = new
            if begin >= self.n - self.pool.rewind:
                pieces.append(mixers.inputs(index, end - begin, own, named) or [])
        noted[index] = [mx.concatenate(list(own), axis=1) for own in zip(*pieces, strict=True)]
        return joined_outputs(outputs)

    def finish(self) -> None:
        """Store the new states of the recurrences, and drop what only this forward needs."""
        for step in self._steps if self.n > 1 else ():
            if isinstance(step, Step):
                step.forget()
        if not self._states:
            return
        inputs = {}
        for index, noted in self._noted.items():
            # A layer whose modules were not all called as in the trial goes back to checkpoints only.
            if len(noted) == len(self.pool.mixers[index].modules):
                inputs[index] = [array for number in sorted(noted) for array in noted[number]]
        columns = sorted({column for inside in self._inside.values() for column in inside})
        for row, (conversation, begin, (first, stop)) in enumerate(
            zip(self.conversations, self.begins, self.columns, strict=True)
        ):
            if first < stop:
                put, sequence = self.pool.recurrent.put_layers, conversation.sequence
                for column in columns:
                    at = {index: inside[column] for index, inside in self._inside.items()}
                    put(self._of_row(at, row), sequence, begin + column)
                put(self._of_row(self._states, row), sequence, inputs=inputs, row=row)

    def _of_row(self, states: Mapping[int, list[mx.array | None]], row: int) -> dict[int, Arrays]:
        if self.is_single:
            return {index: tuple(arrays) for index, arrays in states.items()}
        return {
            index: tuple(None if array is None else array[row : row + 1] for array in arrays)
            for index, arrays in states.items()
        }

    def undo(self) -> None:
        """Remove the tokens from all caches."""
        self._plan.undo()

    def arrays(self) -> list[mx.array]:
        """The arrays that this forward wrote: buffers, recurrent states and their inputs."""
        written: list[mx.array] = []
        for step in self._steps:
            if isinstance(step, Step):
                written += step.arrays
        if self._states:
            for conversation in self.conversations:
                written += self.pool.recurrent.written(conversation.sequence)
        return written

    def step(self, leaf: Leaf) -> Step:
        """The step of a leaf's cache. Raises CacheError if the pool has been changed since."""
        kind = self._kinds[leaf.index]
        step = self._steps[kind]
        is_current: bool = self._caches[kind]._step is step
        if step is None or not is_current:
            raise CacheError(
                "another prompt cache of the same pool has been used in the middle of a forward; run it again"
            )
        return step

    def _batch(self) -> Batch | None:
        """The tokens of the forward, or None if all columns are padding."""
        if self.is_single:
            return Batch.run(self.conversations[0].sequence, self.begins[0], self.n)
        positions: list[int] = []
        sequences: list[int] = []
        for conversation, begin, (first, stop) in zip(
            self.conversations, self.begins, self.columns, strict=True
        ):
            positions += range(begin, begin + stop - first)
            sequences += [conversation.sequence] * (stop - first)
        return Batch(positions, sequences) if positions else None

    def _tokens(self, array: mx.array) -> mx.array:
        """Drop padding: an array (B, heads, n, dim) of the model as (1, heads, tokens, dim)."""
        if self.is_single:
            return array
        if self.is_by_token or self._is_decoding:
            return array.swapaxes(0, 2)
        if self._is_full:
            rows, heads, n, dim = array.shape
            return array.swapaxes(0, 1).reshape(1, heads, rows * n, dim)
        tokens = [
            array[i : i + 1, :, first:stop] for i, (first, stop) in enumerate(self.columns) if first < stop
        ]
        return mx.concatenate(tokens, axis=2)

    def _rows(self, tokens: mx.array) -> mx.array:
        """The reverse of `_tokens`, with zeros for padding."""
        if self.is_single:
            return tokens
        if self.is_by_token:
            return tokens.swapaxes(0, 2)
        _, heads, _, dim = tokens.shape
        if self._is_full:
            return tokens.reshape(heads, len(self.columns), self.n, dim).swapaxes(0, 1)
        rows, start = [], 0
        for first, stop in self.columns:
            own = tokens[:, :, start : start + stop - first]
            rows.append(mx.pad(own, _edges(first, self.n - stop)))
            start += stop - first
        return mx.concatenate(rows)

    def _arrays(self, step: Step, leaf: Leaf) -> History:
        """A leaf's histories, stored already, as arrays (B, ...) that end with the new columns.

        Shorter ones are padded with zeros on the left.
        """
        if self.is_single:
            return step.history(leaf.index, step.parts[0])
        if self.is_by_token:
            raise _no_arrays()
        whole = step.whole if self._is_decoding else None
        if whole and not (whole.prefix or whole.others):
            return step.store.layers[leaf.index].pairs[whole.segment].read_newest(whole.seen)
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

    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        """The mask (B, 1, n, S) of each row's columns for its history; (n, S) for a single sequence."""
        if self.is_single:
            only = step.parts[0]
            return array_mask(rule, positions_of([(only.begin, only.end)]), positions_of(only.ranges))
        if self.is_by_token:
            raise _no_arrays()
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
        # A padding column sees itself: softmax over no keys would be NaN.
        itself = mx.arange(widest + self.n) == widest + mx.arange(self.n)[:, None]
        return seen | (itself & (q < 0))

    def _parts(self, step: Step) -> list[Part | None]:
        """For each row its part of the step, or None if the row is all padding."""
        parts = {part.sequence: part for part in step.parts}
        return [parts.get(conversation.sequence) for conversation in self.conversations]


def narrowed(rule: Rule | None, window_size: int | None) -> Rule:
    """A visibility rule, narrowed to a sliding window of `window_size` tokens if that is given."""
    assert rule is not None
    if window_size is None or isinstance(rule, Chunk):
        return rule
    if isinstance(rule, Causal):
        return Window(window_size)
    return Window(min(rule.size, window_size), rule.sinks)


def cuts_of(pool: Pool, conversations: Sequence[Conversation], begins: Sequence[int], n: int) -> list[int]:
    """The columns before which recurrent states are worth a checkpoint in some row."""
    found = set()
    for conversation, begin in zip(conversations, begins, strict=True):
        borders = pool.recurrent.borders(conversation.sequence, begin, begin + n)
        found |= {border - begin for border in borders}
    return sorted(found)


def newest(conversation: Conversation, leaf: Leaf) -> Arrays:
    """The arrays of a recurrence after a conversation's last token, or ()."""
    return conversation.pool.recurrent.newest(leaf.index, conversation.sequence)


def padded_state(arrays: Arrays, slots: int) -> list[mx.array | None]:
    """One array or None for each slot of a recurrence."""
    return list(arrays) if arrays else [None] * slots


def _edges(before: int, after: int) -> list[tuple[int, int]]:
    """Widths for `mx.pad` along the tokens of an array (1, heads, n, dim)."""
    return [(0, 0), (0, 0), (before, after), (0, 0)]


def _joined(rows: Sequence[mx.array | None]) -> mx.array | None:
    """Join rows (1, ...) to one batch, with zeros for missing rows. None if all are missing."""
    like = next((row for row in rows if row is not None), None)
    if like is None:
        return None
    return mx.concatenate([mx.zeros_like(like) if row is None else row for row in rows])


def _no_arrays() -> NotSupportedError:
    return NotSupportedError(
        "the model needs a history or state as arrays, but an input of one token in each row has only handles"
    )
