"""What the layers of one cache list share: their sequences, and the forward under way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CacheError
from ..quantisation import Quantisation
from .apart import groups, is_one_input, run_apart
from .batched import BatchedForward
from .conversation import Conversation
from .forward import Forward, SingleForward
from .observe import Call, Caller
from .padding import Columns, Padding
from .pool import Pool
from .told import Told

EVALUATE = 64
"""Forwards between evaluations of what nobody may ever read, such as values that a model ignores."""


class Rows(Caller):
    """Conversations that go through the model as the rows of one input.

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
        self._forwards = 0
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

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a call of the model inside a forward of its tokens.

        Raises:
            ValueError: the caches are of another model, or of another number of rows.
        """
        if self.is_called:
            return call(*args, **kwargs)
        if model is not self.pool.model:
            raise ValueError(
                f"the prompt cache is one of another model, a {type(self.pool.model).__module__}, "
                f"and not of this {type(model).__module__}"
            )
        with self.pool.lock:
            n = self._length(args, kwargs)
            columns = self._columns_of(n)
            if self.is_batch and (self.pool.layout.is_recurrent or self.pool.batching == "apart"):
                self.settle()
                together = groups(self, columns)
                if together and not is_one_input(self, together, columns, n):
                    output = run_apart(self, together, columns, n, call, args, kwargs)
                    self.padding.passed(columns)
                    return output
            self.begin(n, is_called=True)
            try:
                output = call(*args, **kwargs)
                self.finish()
            except BaseException:
                self.settle()
                raise
            return output

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
        for conversation, (first, stop) in zip(self.conversations, columns, strict=True):
            conversation.make_room(stop - first, early=is_called)
        self.forward = self._forward_of(columns, n, is_ragged)

    def _goes_on(self, n: int) -> bool:
        """Start a forward like the last one, which costs little, if nothing has happened since."""
        last, self._last = self._last, None
        if last is None or last.n != n or last.pool is not self.pool or self.padding.is_announced:
            return False
        self.check_open()
        self.pool.take_turn(self)
        capacity = self.conversations[0].limits.capacity
        if (capacity is not None and last.begins[0] + 2 * n > capacity) or not last.again():
            return False
        self.forward = last
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
        self.forward, self.is_called, self._offsets = None, False, None
        self._last = forward if isinstance(forward, SingleForward) else None
        self.padding.passed(forward.columns)
        self._forwards += 1
        if self._forwards % EVALUATE == 0:
            mx.async_eval(self.pool.buffers)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Undo a forward that was left unfinished, and take the pool."""
        self.check_open()
        forward, self.forward = self.forward, None
        self.is_called, self._offsets = False, None
        if forward is not None:
            forward.undo()
        self.pool.take_turn(self)

    def can_resume(self, position: int) -> bool:
        """Whether the only conversation can go on from `position`."""
        return self.pool.can_resume(self.conversation.sequence, position)

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` that the only conversation can go on from."""
        return self.pool.resume_point(self.conversation.sequence, position)

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every row, or all of them where there are fewer.

        Raises:
            NotSupportedError: a row cannot go back as far; none has changed.
        """
        with self.edit():
            before = self.positions
            targets = [max(0, position - n) for position in before]
            for conversation, target in zip(self.conversations, targets, strict=True):
                conversation.check_resume(target)
            for conversation, target in zip(self.conversations, targets, strict=True):
                conversation.rewind_to(target)
            return min(n, max(before, default=0))

    def prepare(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> None:
        """As `Padding.prepare`."""
        with self.edit():
            self.padding.prepare(left, lengths, right)

    def finalize(self) -> None:
        """As `Padding.finalize`."""
        with self.edit():
            self.padding.finalize()

    def filter(self, keep: Sequence[int]) -> None:
        """Let go of all rows but these."""
        with self.edit():
            self.conversations = [self.conversations[row] for row in keep]
            self.padding = self.padding.filtered(keep)

    def extend(self, other: Rows) -> None:
        """Take forks of another's rows behind these. Raises ValueError for one of another pool."""
        with self.edit():
            self._check_joins(other)
            self.conversations += [conversation.fork() for conversation in other.conversations]
            self.padding = self.padding.extended(other.padding)

    def merged(self, all_rows: Sequence[Rows]) -> Rows:
        """A batch of forks of all these, self among them. Raises ValueError for one of another pool."""
        with self.edit():
            for other in all_rows:
                self._check_joins(other)
            forks = [conversation.fork() for other in all_rows for conversation in other.conversations]
            return Rows(self.pool, forks, is_batch=True)

    def extracted(self, row: int) -> Rows:
        """A fork of one row, no batch any more."""
        with self.edit():
            return Rows(self.pool, [self.conversations[row].fork()], is_batch=False)

    def fork(self) -> Rows:
        """The same rows, to go their own way. Copies no array."""
        with self.edit():
            other = self.subset(range(len(self.conversations)), is_fork=True)
            other.padding = self.padding.filtered(range(len(self.conversations)))
            return other

    def subset(self, members: Sequence[int], is_fork: bool = False) -> Rows:
        """Some rows, or forks of them, without padding to come."""
        chosen = [self.conversations[row] for row in members]
        is_batch = self.is_batch and (is_fork or self.pool.batching != "apart")
        return Rows(self.pool, [c.fork() for c in chosen] if is_fork else chosen, is_batch)

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Between forwards: what was left unfinished is undone, and no other thread is at work."""
        with self.pool.lock:
            self.settle()
            yield
            self._offsets = None

    def quantise(self, quantisation: Quantisation) -> None:
        """Store keys and values in fewer bits from here on, if they are in the model's precision.

        Raises:
            ValueError: heads that groups do not divide; nothing has changed.
        """
        with self.edit():
            if self.pool.quantisation is None:
                pool = self.pool.sibling(quantisation)
                self.conversations = [conversation.moved(pool) for conversation in self.conversations]
                self.pool = pool
                pool.take_turn(self)

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

    def _check_joins(self, other: Rows) -> None:
        other.settle()
        if other.pool is not self.pool:
            raise ValueError(
                "prompt caches of different pools cannot join one batch: they must be of the same model, "
                "and made with the same options"
            )

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

    def _length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How many columns the model's input has. Raises ValueError for other rows than there are."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, mx.array) and value.ndim >= 2 and value.shape[1]:
                if value.shape[0] != self._input_rows:
                    raise ValueError(f"{value.shape[0]} rows of input for a cache of {self._input_rows}")
                return value.shape[1]
        raise ValueError("the model is called without tokens")
