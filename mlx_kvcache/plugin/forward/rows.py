"""The forward under way of conversations that are the rows of one input: how it begins and ends.

What the layers of one cache list share: their sequences, and what is done with them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...arguments import whole
from ...caches.plan import JointPlan
from ...errors import CacheError
from ...quantization import Quantization
from ..hosts.observe import Call, Caller, is_cache
from ..pool.conversation import Conversation
from ..pool.pool import Pool
from .agreement import Told, edit_together, forward_together, named, unless_all_can
from .forward import BatchedForward, Columns, Forward, Padding, SingleForward, TokenForward
from .row_groups import groups, is_one_input, run_apart


class Passes:
    """Conversations that go through the model together, one pass after the other.

    A forward begins and ends with the model's call. Where somebody else drives the layers, it
    begins when one asks for a mask or writes with nothing left to write, and is over when all
    have written. One that is still open when a layer asks or writes again was left by an
    exception; it is undone.

    Args:
        conversations: of one pool.
        is_batch: whether mlx-lm sees a batch (also of one row): offsets are then arrays (B,).
    """

    def __init__(self, pool: Pool, conversations: Sequence[Conversation], is_batch: bool) -> None:
        self.pool = pool
        self.conversations = list(conversations)
        self.is_batch = is_batch
        self.padding = Padding(len(self.conversations))
        self.forward: Forward | None = None
        self._last: SingleForward | None = None
        self.interrupted = False
        names = [leaf.name for leaf in pool.leaves]
        self.edits = Told(names, strict=True)
        self.copies = Told(names, strict=False)
        self.is_called = False
        self._offsets: tuple[Any, Any] | None = None
        self.written_last = bytearray()

    @property
    def unfinished(self) -> bool:
        """Whether a forward is under way, or was left by an exception."""
        return self.forward is not None

    @property
    def conversation(self) -> Conversation:
        """The only one. Raises CacheError where there are several."""
        if len(self.conversations) != 1:
            raise CacheError(f"a batch of {len(self.conversations)} sequences is not one conversation")
        return self.conversations[0]

    @property
    def positions(self) -> list[int]:
        """Tokens of each conversation; those of an unfinished forward do not count."""
        self.check_open()
        if self.forward is not None:
            return list(self.forward.begins)
        return [conversation.position for conversation in self.conversations]

    def offset(self, leaf: int) -> Any:
        """Where RoPE goes on for a leaf: an int, or an array (B,) that never changes."""
        if self._offsets is None:
            self._offsets = self._find_offsets()
        forward = self.forward
        return self._offsets[forward is not None and forward.written[leaf]]

    def check_open(self) -> None:
        for conversation in self.conversations:
            conversation.check_open()

    def begin(self, n: int, is_called: bool = False) -> None:
        """Start a forward of n columns, after making room for its tokens."""
        if not self._goes_on(n):
            self._start(n, is_called)
        self._offsets = None
        self.is_called = is_called
        self.interrupted = False
        self.edits.forget()

    def _start(self, n: int, is_called: bool) -> None:
        self.settle()
        columns = self._columns_of(n)
        # Whoever drives layers by hand wants arrays; only a model's call is known to attend to handles.
        is_ragged = is_called and self._may_be_ragged
        counts = [stop - first for first, stop in columns]
        full = [(c, n) for c, n in zip(self.conversations, counts, strict=True) if not c.has_room(n)]
        for conversation, count in full:
            # Of all rows, before one of them shifts.
            conversation.check_room(count, early=is_called)
        for conversation, count in full:
            with self.pool.ranks.together(
                f"make room for {count} tokens in conversation {conversation.name}"
            ):
                conversation.make_room(count, early=is_called)
        forward = self._forward_of(columns, n, is_ragged)
        try:
            self.forward = forward
            forward.start()
        except BaseException:
            self.settle()
            raise

    def _goes_on(self, n: int) -> bool:
        """Start a forward like the last one, which costs little, if nothing has happened since."""
        last, self._last = self._last, None
        if last is None or last.n != n or last.pool is not self.pool or self.padding.is_announced:
            return False
        self.check_open()
        self.pool.take_turn(self)
        capacity = self.conversations[0].limits.capacity
        if capacity is not None and last.begins[0] + 2 * n > capacity:
            return False
        begins = last.begins
        try:
            if not last.again():
                return False
            self.forward = last
        except BaseException:
            if last.begins is not begins:
                last.undo()
            raise
        return True

    def is_open(self, leaf: int, n: int) -> bool:
        """Whether a forward of n columns waits for this leaf."""
        forward = self.forward
        if forward is None:
            return False
        return self.is_called or (forward.n == n and not forward.written[leaf])

    def begin_unasked(self, n: int) -> None:
        """Start a forward because a layer writes, though none has asked for a mask.

        Raises:
            CacheError: it may be the rest of a forward that was not finished; that is undone.
        """
        if self.interrupted:
            self.interrupted = False
            raise CacheError(
                "another prompt cache of the same pool was used in the middle of a forward; "
                "the tokens of that forward have been taken out, so it can be run again"
            )
        if self.unfinished:
            self.settle()
            raise CacheError(
                "a forward was left unfinished; its tokens have been taken out, so it can be run again"
            )
        self.begin(n)

    def wrote(self) -> None:
        """A leaf has stored its tokens. A forward that no call ends is over when all have."""
        forward = self.forward
        assert forward is not None
        if not self.is_called and forward.written.count(True) >= len(self.pool.forms):
            self.finish()

    def finish(self) -> None:
        """The forward is over."""
        forward = self.forward
        assert forward is not None
        forward.finish()
        self.written_last = forward.written
        # From here on the tokens are in.
        padding = self.padding.passed(forward.columns)
        self.forward, self.padding, self.is_called, self._offsets = None, padding, False, None
        self._last = forward if isinstance(forward, SingleForward) else None
        self.pool.compute(forward.arrays())

    def settle(self) -> None:
        """Undo a forward that was left unfinished, and take the pool."""
        self.abandon()
        self.check_open()
        self.pool.take_turn(self)

    def abandon(self) -> None:
        """Undo a forward that was left unfinished, also of a conversation that is closed."""
        forward = self.forward
        if forward is not None:
            forward.undo()
        self.forward, self.is_called, self._offsets = None, False, None
        if forward is not None:
            # Its cells are free, but the buffers still wait for what it wrote there. Nobody can compute
            # that where it was another thread that drove the layers by hand and stopped between two.
            with suppress(RuntimeError):
                self.pool.compute(forward.arrays())

    def leave(self) -> None:
        """Let go of what is kept for the next forward, and of one that somebody drives by hand."""
        with self.pool.lock:
            if not self.is_called:
                self.abandon()
                self._last = None

    def _columns_of(self, n: int) -> list[Columns]:
        return self.padding.columns(n)

    def _forward_of(self, columns: Sequence[Columns], n: int, is_ragged: bool) -> Forward:
        if self.is_batch:
            return BatchedForward(self.pool, self.conversations, columns, n, is_ragged)
        return SingleForward(self.conversation, n, is_ragged)

    @property
    def _input_rows(self) -> int:
        """How many rows the model's input has."""
        return len(self.conversations)

    @property
    def _may_be_ragged(self) -> bool:
        """Whether the model may be given handles, where that saves copies."""
        saves = self.is_batch or self.pool.wants_handles(self.conversation.sequence)
        return saves and self.pool.batching == "ragged"

    def _find_offsets(self) -> tuple[Any, Any]:
        """Offsets before the forward under way, and after it."""
        offsets = [
            position + conversation.head.lead - left
            for position, conversation, left in zip(
                self.positions, self.conversations, self.padding.left, strict=True
            )
        ]
        n = self.forward.n if self.forward else 0
        if not self.is_batch:
            return offsets[0], offsets[0] + n
        before = mx.array(offsets, mx.int32)
        return before, before + n


class Rows(Passes, Caller):
    """Conversations as the rows of one input: called by a model, and edited between its calls."""

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a call of the model inside a forward of its tokens.

        Raises:
            ValueError: the caches are of another model, or of another number of rows.
        """
        if self.is_called:
            return call(*args, **kwargs)
        self.check_called_by(model)
        with self.pool.lock:
            n = self._length(args, kwargs)
            columns = self._columns_of(n)
            block = self._block(columns, n)
            if block < n:
                return self._run_in_blocks(n, block, model, call, args, kwargs)
            if self.is_batch and (self.pool.layout.is_recurrent or self.pool.batching == "apart"):
                self.settle()
                together = groups(self, columns)
                if together and not is_one_input(self, together, columns, n):
                    output = run_apart(self, together, columns, n, call, args, kwargs)
                    self.padding = self.padding.passed(columns)
                    return output

            def called() -> Any:
                try:
                    super(Rows, self).begin(n, is_called=True)
                    with unless_all_can(self.pool):
                        output = call(*args, **kwargs)
                    self.finish()
                except BaseException:
                    self.settle()
                    raise
                return output

            return forward_together(self, n, (*args, *kwargs.values()), called)

    def check_called_by(self, model: nn.Module) -> None:
        """Raise ValueError unless the caches are of this model."""
        if model is not self.pool.model:
            raise ValueError(
                f"the prompt cache is one of another model, a {self.pool.architecture}, "
                f"and not of this {type(model).__module__}"
            )

    def _block(self, columns: Sequence[Columns], n: int) -> int:
        """How many of n columns the model should be given at once."""
        pairs = zip(self.conversations, columns, strict=True)
        blocks = (conversation.block(stop - first) for conversation, (first, stop) in pairs)
        return min(filter(None, blocks), default=n)

    def _run_in_blocks(
        self,
        n: int,
        size: int,
        model: nn.Module,
        call: Call,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> mx.array:
        """Call the model on one block of columns after another."""
        outputs = []
        for begin in range(0, n, size):
            block = functools.partial(_columns, n, slice(begin, begin + size))
            named = {name: block(value) for name, value in kwargs.items()}
            outputs.append(self.run(model, call, tuple(map(block, args)), named))
        return mx.concatenate(outputs, axis=1)

    def begin(self, n: int, is_called: bool = False) -> None:
        """Start a forward that no call of the model ends: all ranks do, or none."""

        def begun() -> None:
            try:
                super(Rows, self).begin(n, is_called)
                self.pool.ranks.ready()
            except BaseException:
                self.settle()
                raise

        forward_together(self, n, (), begun)

    def can_resume(self, position: int) -> bool:
        """Whether the only conversation can go on from `position`, on every rank."""
        return bool(self.pool.ranks.least(self.pool.can_resume(self.conversation.sequence, position)))

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` that the only conversation can go on from, on every rank."""
        ranks = self.pool.ranks
        while True:
            point = ranks.least(self.pool.resume_point(self.conversation.sequence, position))
            # A rank with other layers may have to go back further from where this one can.
            if point == position or ranks.is_alone:
                return point
            position = point

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every row, or all of them where there are fewer.

        Raises:
            NotSupportedError: a row cannot go back as far; none has changed.
        """
        (n,) = whole(None, n=n)
        with self.edit(f"trim {n} tokens"):
            before = self.positions
            plans = [
                conversation.plan_rewind(max(0, position - n))
                for conversation, position in zip(self.conversations, before, strict=True)
            ]
            self.pool.commit(JointPlan(plans))
            return min(n, max(before, default=0))

    def prepare(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> None:
        """As `Padding.prepared`."""
        with self.edit(f"prepare for {left}, {lengths}, {right}", is_sure=True):
            self.padding = self.padding.prepared(left, lengths, right)

    def finalize(self) -> None:
        """As `Padding.finalized`."""
        with self.edit("finalize", is_sure=True):
            self.padding = self.padding.finalized()

    def filter(self, keep: Sequence[int]) -> None:
        """Let go of all rows but these; one that is named again is forked."""
        keep = [self._row(row) for row in keep]
        with self.edit(f"keep rows {keep}", is_sure=len(set(keep)) == len(keep)):
            kept = [
                self.conversations[row].fork() if row in keep[:place] else self.conversations[row]
                for place, row in enumerate(keep)
            ]
            self.conversations, self.padding = kept, self.padding.filtered(keep)

    def extend(self, other: Rows) -> None:
        """Take forks of another's rows behind these. Raises ValueError for one of another pool."""
        with self.edit(f"take in {named(other)}"):
            self._check_joins(other)
            forks = [conversation.fork() for conversation in other.conversations]
            joined = [*self.conversations, *forks]
            self.conversations, self.padding = joined, self.padding.extended(other.padding)

    def merged(self, all_rows: Sequence[Rows]) -> Rows:
        """A batch of forks of all these, self among them. Raises ValueError for one of another pool."""
        with self.edit("join " + ", ".join(map(named, all_rows))):
            for other in all_rows:
                self._check_joins(other)
            forks = [conversation.fork() for other in all_rows for conversation in other.conversations]
            return Rows(self.pool, forks, is_batch=True)

    def extracted(self, row: int) -> Rows:
        """A fork of one row, no batch any more."""
        row = self._row(row)
        with self.edit(f"fork row {row}"):
            return Rows(self.pool, [self.conversations[row].fork()], is_batch=False)

    def fork(self) -> Rows:
        """The same rows, to go their own way. Copies no array."""
        with self.edit("fork"):
            other = self.subset(range(len(self.conversations)), is_fork=True)
            other.padding = self.padding.filtered(range(len(self.conversations)))
            return other

    def subset(self, members: Sequence[int], is_fork: bool = False) -> Rows:
        """Some rows, or forks of them, without padding to come."""
        chosen = [self.conversations[row] for row in members]
        is_batch = self.is_batch and (is_fork or self.pool.batching != "apart")
        return Rows(self.pool, [c.fork() for c in chosen] if is_fork else chosen, is_batch)

    @contextmanager
    def edit(self, about: str, is_sure: bool = False) -> Iterator[None]:
        """Between forwards: what was left unfinished is undone, and no other thread is at work.

        Args:
            about: what is about to be done, for the other ranks; see `Ranks.together`.
            is_sure: it can be done, so that ranks need no more than to agree on it.

        Raises:
            RanksDisagreeError: another rank does something else, or cannot; nothing has changed.
        """
        with self.pool.lock:
            self.settle()
            with edit_together(self, about, is_sure):
                yield

    def quantize(self, quantization: Quantization) -> None:
        """Store keys and values in fewer bits from here on, if they are in the model's precision.

        Raises:
            ValueError: heads that groups do not divide; nothing has changed.
        """
        with self.edit(f"store in fewer bits: {quantization}"):
            if self.pool.quantization is None:
                pool = self.pool.sibling(quantization)
                with pool.lock:
                    moved = [conversation.moved(pool) for conversation in self.conversations]
                    self.conversations, self.pool = moved, pool
                    pool.take_turn(self)

    def _row(self, row: int) -> int:
        """A row's index, from 0. Raises ValueError where there is none."""
        (row,), size = whole(None, row=row), len(self.conversations)
        if not -size <= row < size:
            raise ValueError(f"row {row} of a batch of {size}")
        return row % size

    def _check_joins(self, other: Rows) -> None:
        # Before it is settled, as only this pool's lock is held.
        if other.pool is not self.pool:
            raise ValueError(
                "prompt caches of different pools cannot join one batch: they must be of the same model, "
                "and made with the same options"
            )
        other.settle()

    def _length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How many columns the model's input has. Raises ValueError for another number of rows or layers."""
        given, layers = (*args, *kwargs.values()), len(self.pool.layout.entries)
        entries = next((len(value) for value in given if is_cache(value)), layers)
        if entries < layers:
            raise ValueError(f"the model is called with {entries} of the {layers} layers of its prompt cache")
        for value in given:
            if isinstance(value, mx.array) and value.ndim >= 2 and value.shape[1]:
                if value.shape[0] != self._input_rows:
                    raise ValueError(f"{value.shape[0]} rows of input for a cache of {self._input_rows}")
                return value.shape[1]
        for value in given:
            if isinstance(value, mx.array):
                empty = ": at least 1 token is needed" if not value.size else ""
                raise ValueError(f"tokens must be (batch, n), got shape {value.shape}{empty}")
        raise ValueError("the model is called without tokens: an array (batch, n) is needed")


def _columns(n: int, block: slice, argument: Any) -> Any:
    """An argument of the model's call for some of its n columns."""
    is_by_column = isinstance(argument, mx.array) and argument.ndim >= 2 and argument.shape[1] == n
    return argument[:, block] if is_by_column else argument


class TokenRows(Rows):
    """Conversations that take some tokens each, as one input of shape (tokens, 1).

    Args:
        counts: how many tokens of each conversation.
    """

    def __init__(self, pool: Pool, conversations: Sequence[Conversation], counts: Sequence[int]) -> None:
        super().__init__(pool, conversations, is_batch=True)
        self._counts = list(counts)

    @property
    def _input_rows(self) -> int:
        return sum(self._counts)

    def _columns_of(self, n: int) -> list[Columns]:
        return [(0, count) for count in self._counts]

    def _forward_of(self, columns: Sequence[Columns], n: int, is_ragged: bool) -> Forward:
        return TokenForward(self.pool, self.conversations, columns, n)

    def _find_offsets(self) -> tuple[Any, Any]:
        offsets: list[int] = []
        for position, conversation, count in zip(
            self.positions, self.conversations, self._counts, strict=True
        ):
            first = position + conversation.head.lead
            offsets += range(first, first + count)
        before = mx.array(offsets, mx.int32)
        return before, before + 1
