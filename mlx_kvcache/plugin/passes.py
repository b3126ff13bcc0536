"""The forward under way of conversations that are the rows of one input: how it begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx

from ..errors import CacheError
from .batched import BatchedForward
from .conversation import Conversation
from .forward import Forward, SingleForward
from .padding import Columns, Padding
from .pool import Pool
from .told import Told


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
