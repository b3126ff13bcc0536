"""The rows behind one cache list: when their forward begins and ends, and the edits between forwards.

A call of the model is one forward: it begins and ends with the call. If layers are driven by hand, a forward
begins with the first mask or write, and ends when every layer has written. Each cell of this table says what
a call (column) does in a state (row), and the state afterwards. "undo" takes the forward's tokens out again.

              make_mask(n)      update_and_fetch   model call       edit [1]     exception [2]  other user [3]
none          begin: asked      begin, write:      begin: called    edit         -              -
                                partly
asked         join [4], or      write: partly      undo, begin:     undo, edit:  -              undo:
              restart: asked                       called           none                        interrupted
partly        join [4], or      write [5]; if      undo, begin:     undo, edit:  -              undo:
              restart: asked    written already:   called           none                        interrupted
                                undo, error: none
called        the call's mask   write; if written  join [6]         undo [7]     undo: none     undo [7]:
                                already: error                                                  interrupted
interrupted   begin: asked      error: none        begin: called    edit         -              -

After all layers have written by hand, the state is none; in a model's call it stays called until the call
returns. The error is CacheError.

[1] trim, prepare, finalize, filter, extend, merge, extract, rewind, remove, fork, save, to_quantized. close()
    undoes a forward that is driven by hand, but lets a model's call end before the cells are freed.
[2] Of a model's call, and raised after it has begun. CacheFullError undoes a forward that was open, too. A
    call with another model's cache, without tokens, or with a wrong number of rows raises before it changes
    anything. An exception in a layer that is driven by hand, or between two, leaves the forward open.
[3] A forward or an edit of other rows in the same pool, which has one open forward at most. Reading, and
    making a cache, do not count. Calls and edits hold the pool's lock, so other threads wait for a call to
    end; layers driven by hand do not hold it.
[4] If the layer has neither asked for a mask nor written in this forward, and n is the forward's length.
[5] The last layer's write ends the forward: none. A recurrent layer writes by assigning its last slot; it
    never begins a forward, so in the states none and interrupted this is an error that changes nothing.
[6] The inner call belongs to the outer call's forward.
[7] Not supported: the rest of the call runs in the new state, so the call ends with a wrong output, with a
    CacheError, or with an AssertionError.

Announced padding is not a state: it chooses the columns of the input that are tokens, and lowers offsets by
the padding on the left. A forward uses it up when it ends, not when it is undone. Otherwise only prepare,
finalize, filter and extend change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...arguments import whole
from ...caches.plan import JointPlan
from ...errors import CacheError
from ...quantization import Quantization
from ..hosts.host import found_logits
from ..hosts.observe import Call, Caller, is_cache
from ..pool.conversation import Conversation
from ..pool.pool import Pool
from ..rope import axes
from ..rope.axes import ARGUMENT, Prompt
from ..rope.rebase import Head
from .agreement import Told, edit_together, forward_together, named, unless_all_can
from .division import edges_of, groups, is_one_input, needs_groups, run_apart, run_in_blocks
from .forward import Columns, Form, Forward, Padding


class Rows(Caller):
    """Conversations that are the rows of one input, shared by all layers of a cache list.

    Args:
        pool: the pool of all conversations.
        conversations: one for each row.
        is_batch: whether mlx-lm sees a batch, which may have one row: offsets are then arrays (B,).

    Attributes:
        forward: the forward under way, or None.
        is_called: whether a call of the model drives that forward.
        is_divided: whether that call is one of the blocks of a longer one.
        interrupted: whether another user of the pool has undone a forward of these rows, and no layer has
            noticed yet.
        padding: the padding of the coming inputs.
        edits: runs an edit once although every layer is told to make it.
        copies: the same for methods that return other rows.
        prompt: what the last call was told of positions on several axes.
        written_last: for each leaf, whether it wrote in the last complete forward.
        offsets: the offsets before the forward under way and after it, once a layer has asked for one.
    """

    def __init__(self, pool: Pool, conversations: Sequence[Conversation], is_batch: bool) -> None:
        self.pool = pool
        self.conversations = list(conversations)
        self.is_batch = is_batch
        self.padding = Padding([0] * len(self.conversations))
        self.forward: Forward | None = None
        # The next forward of as many tokens repeats it, which costs little.
        self._last: Forward | None = None
        self.interrupted = False
        names = [leaf.name for leaf in pool.leaves]
        self.edits = Told(names, strict=True)
        self.copies = Told(names, strict=False)
        self.is_called = False
        self.is_divided = False
        self.prompt: Prompt | None = None
        self.offsets: tuple[Any, Any] | None = None
        self.written_last = bytearray()

    @property
    def unfinished(self) -> bool:
        """Whether a forward has begun that has neither ended nor been undone."""
        return self.forward is not None

    @property
    def conversation(self) -> Conversation:
        """The only conversation. Raises CacheError if there are several."""
        if len(self.conversations) != 1:
            raise CacheError(
                f"this needs a cache of one conversation, but the batch has {len(self.conversations)} rows; "
                "extract a row first"
            )
        return self.conversations[0]

    @property
    def positions(self) -> list[int]:
        """The number of tokens of each conversation, without those of a forward under way."""
        self.check_open()
        if self.forward is not None:
            return list(self.forward.begins)
        return [conversation.position for conversation in self.conversations]

    def offset(self, leaf: int) -> Any:
        """The RoPE offset of a leaf's next token: an int, or for a batch an array (B,) that never changes."""
        if leaf not in self.pool.forms:
            # The model never writes it, such as cross-attention without a picture.
            return mx.zeros(len(self.conversations), mx.int32) if self.is_batch else 0
        if self.offsets is None:
            self.offsets = self._find_offsets()
        forward = self.forward
        return self.offsets[forward is not None and forward.written[leaf]]

    def check_open(self) -> None:
        for conversation in self.conversations:
            conversation.check_open()

    def begin(self, n: int) -> None:
        """Begin a forward of n columns that the layers drive by hand: on all ranks, or on none."""

        def begun() -> None:
            try:
                self._begin(n, is_called=False)
                self.pool.ranks.ready()
            except BaseException:
                self.settle()
                raise

        forward_together(self, n, (), begun)

    def _begin(self, n: int, is_called: bool) -> None:
        """Begin a forward of n columns. Undoes an open one and makes room first."""
        if not self._goes_on(n):
            self._start(n, is_called)
        self._began(is_called)

    def _began(self, is_called: bool) -> None:
        self.offsets = None
        self.is_called = is_called
        self.interrupted = False
        self.edits.forget()

    def _start(self, n: int, is_called: bool) -> None:
        # The first access tries the model, so that its modules can be watched from the first call on.
        _ = self.pool.mixers
        self.settle()
        for conversation in self.conversations:
            conversation.join_waiting(early=is_called)
        columns = self._columns_of(n)
        # Only a model's call is known to attend to handles. Layers driven by hand return arrays.
        is_ragged = self._form == "tokens" or (is_called and self._may_be_ragged)
        counts = [stop - first for first, stop in columns]
        full = [(c, n) for c, n in zip(self.conversations, counts, strict=True) if not c.has_room(n)]
        for conversation, count in full:
            # Check all rows before one of them shifts.
            conversation.check_room(count, early=is_called)
        for conversation, count in full:
            with self.pool.ranks.together(
                f"make room for {count} tokens in conversation {conversation.name}"
            ):
                conversation.make_room(count, early=is_called)
        forward = Forward(self.pool, self.conversations, columns, n, self._form, is_ragged)
        try:
            self.forward = forward
            forward.start()
        except BaseException:
            self.settle()
            raise

    def _goes_on(self, n: int) -> bool:
        """Repeat the last forward for the next n tokens if nothing changed since. Returns False otherwise."""
        last, self._last = self._last, None
        if last is None or last.n != n or last.pool is not self.pool or self.padding.is_announced:
            return False
        # `again` refuses once a conversation was closed and released, so none is asked whether it is open.
        if last.conversations is not self.conversations or not self.pool.goes_on(self):
            return False
        for conversation, begin in zip(self.conversations, last.begins, strict=True):
            capacity = conversation.limits.capacity
            if conversation.waiting or (capacity is not None and begin + 2 * n > capacity):
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
        """Whether a forward of n columns is under way that this leaf can still join."""
        forward = self.forward
        if forward is None:
            return False
        return self.is_called or (forward.n == n and not forward.written[leaf])

    def begin_unasked(self, n: int) -> None:
        """Begin a forward because a layer writes without having asked for a mask.

        Raises:
            CacheError: another user of the pool undid the forward that this layer was in, or the layer has
                written in a forward that is still open; that one is undone.
        """
        if self.interrupted:
            self.interrupted = False
            raise CacheError(
                "another prompt cache of the same pool was used in the middle of a forward; "
                "the forward was undone: run it again from its first layer"
            )
        if self.unfinished:
            self.settle()
            raise CacheError(
                "a forward was left unfinished: a layer wrote again before all layers had written; "
                "the forward was undone: run it again from its first layer"
            )
        self.begin(n)

    def wrote(self) -> None:
        """End a forward that is driven by hand if every leaf has written."""
        forward = self.forward
        assert forward is not None
        if not self.is_called and forward.written.count(True) >= len(self.pool.forms):
            self.finish()

    def finish(self, output: Any = None) -> None:
        """End the forward: its tokens stay.

        Args:
            output: the model's output. The logits of a single token are computed with what it wrote, because
                they are nearly always wanted, and two evaluations take longer than one.
        """
        forward = self.forward
        assert forward is not None
        forward.finish()
        self.written_last = forward.written
        if self.padding.is_announced:
            self.padding = self.padding.passed(forward.columns)
        self.forward, self.is_called, self.offsets = None, False, None
        # Others would only keep arrays of their states and inputs in memory.
        self._last = forward if forward.is_repeatable else None
        logits = found_logits(output) if forward.n == 1 else None
        self.pool.compute_forward(forward.arrays() + ([] if logits is None else [logits]))

    def settle(self) -> None:
        """Undo an open forward, and become the current user of the pool. Raises CacheError if closed."""
        self.abandon()
        self.check_open()
        self.pool.take_turn(self)

    def abandon(self) -> None:
        """Undo an open forward, even of a closed conversation."""
        forward = self.forward
        if forward is not None:
            forward.undo()
        self.forward, self.is_called, self.offsets = None, False, None
        if forward is not None:
            # The cells are free, but the buffers still hold unevaluated writes. They cannot be evaluated
            # if another thread drove the layers by hand and stopped between two of them.
            with suppress(RuntimeError):
                self.pool.compute(forward.arrays())

    def leave(self) -> None:
        """Undo a forward that is driven by hand, and drop the state kept for the next one."""
        with self.pool.lock:
            if not self.is_called:
                self.abandon()
                self._last = None

    def _columns_of(self, n: int) -> list[Columns]:
        return self.padding.columns(n)

    @property
    def _form(self) -> Form:
        return "rows" if self.is_batch else "single"

    @property
    def _input_rows(self) -> int:
        """The number of rows of the model's input."""
        return len(self.conversations)

    @property
    def _may_be_ragged(self) -> bool:
        """Whether the model accepts handles, and they save copies."""
        saves = self.is_batch or self.pool.wants_handles(self.conversation.sequence)
        return saves and self.pool.batching == "ragged"

    def _find_offsets(self) -> tuple[Any, Any]:
        """The offsets before the forward under way, and after it."""
        forward = self.forward
        positions, n = (forward.begins, forward.n) if forward else (self.positions, 0)
        offsets = [
            position + conversation.head.lead - left
            for position, conversation, left in zip(
                positions, self.conversations, self.padding.left, strict=True
            )
        ]
        if not self.is_batch:
            return offsets[0], offsets[0] + n
        before = mx.array(offsets, mx.int32)
        return before, before + n

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model inside a forward of its tokens.

        The call is split into several forwards if a shift must make room between blocks, or if the rows
        cannot share an input.

        Raises:
            ValueError: the caches belong to another model, the input has another number of rows, or it has
                no tokens; nothing has changed.
            CacheFullError: there is no room; an open forward is undone.
        """
        if self.is_called:
            return call(*args, **kwargs)
        self.check_called_by(model)
        with self.pool.lock:
            n = self._length(args, kwargs)
            if self._last and self.pool.ranks.is_alone and not self.pool.keeps_positions:
                # What is asked below has not changed since the last forward.
                try:
                    if self._goes_on(n):
                        self._began(is_called=True)
                        output = call(*args, **kwargs)
                        self.finish(output)
                        return output
                except BaseException:
                    self.settle()
                    raise
            columns = self._columns_of(n)
            relative = axes.told_by(self, columns, n, args, kwargs) if self.pool.keeps_positions else None
            if relative is not None:
                kwargs = {**kwargs, ARGUMENT: relative}
            edges = edges_of(self, columns, n)
            if len(edges) > 2:
                return run_in_blocks(self, edges, model, call, args, kwargs)
            if self.is_batch and needs_groups(self, columns):
                self.settle()
                together = groups(self, columns)
                if together and not is_one_input(self, together, columns, n):
                    output = run_apart(self, together, columns, n, call, args, kwargs)
                    self.padding = self.padding.passed(columns)
                    return output

            def called() -> Any:
                heads: list[Head] = []
                try:
                    self._begin(n, is_called=True)
                    named = kwargs
                    if self.pool.axes is not None:
                        named = {**kwargs, ARGUMENT: axes.argument(self, columns, n, relative)}
                    with unless_all_can(self.pool):
                        output = call(*args, **named)
                    if relative is not None:
                        heads = [conversation.head for conversation in self.conversations]
                        axes.note(self, columns, relative)
                    if self.forward is None:
                        raise CacheError(
                            "a prompt cache of the same pool was changed or used inside the model's call; "
                            "the forward was undone: change caches between calls, and call the model again"
                        )
                    self.finish(output)
                except BaseException:
                    if self.unfinished:
                        for conversation, head in zip(self.conversations, heads, strict=False):
                            conversation.head = head
                    self.settle()
                    raise
                return output

            return forward_together(self, n, (*args, *kwargs.values()), called)

    def check_called_by(self, model: nn.Module) -> None:
        """Raise ValueError unless the caches belong to this model."""
        if model is not self.pool.model:
            raise ValueError(
                f"the prompt cache was made for another model, a {self.pool.architecture}, "
                f"not for this {type(model).__module__}; make one by make_prompt_cache(model)"
            )

    def can_resume(self, position: int) -> bool:
        """Whether every rank can resume the only conversation at `position`."""
        return bool(self.pool.ranks.least(self.pool.can_resume(self.conversation.sequence, position)))

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` at which every rank can resume the only conversation."""
        ranks = self.pool.ranks
        while True:
            point = ranks.least(self.pool.resume_point(self.conversation.sequence, position))
            # A rank with other layers may have to go back further than this one.
            if point == position or ranks.is_alone:
                return point
            position = point

    def mark(self, position: int) -> bool:
        """Mark a position of the only conversation as worth a checkpoint; see `PromptCache.mark`."""
        with self.edit(f"mark position {position}", is_sure=True):
            return self.pool.mark(self.conversation.sequence, position)

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every row, or all tokens of rows that have fewer.

        Returns:
            The number of tokens dropped from the longest row.

        Raises:
            NotSupportedError: a row cannot be resumed at the earlier position; no row has changed.
        """
        (n,) = whole(None, n=n)
        with self.edit(f"trim {n} tokens"):
            before = self.positions
            self._rewind_to([max(0, position - n) for position in before])
            return min(n, max(before, default=0))

    def rewind_to(self, positions: Sequence[int]) -> None:
        """Drop the tokens of each row from a position on. Raises as `trim`."""
        with self.edit(f"rewind rows to {list(positions)}"):
            self._rewind_to(positions)

    def _rewind_to(self, positions: Sequence[int]) -> None:
        pairs = zip(self.conversations, positions, strict=True)
        self.pool.commit(JointPlan([conversation.plan_rewind(position) for conversation, position in pairs]))

    def prepare(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> None:
        """Announce padding; see `Padding.prepared`."""
        with self.edit(f"prepare for {left}, {lengths}, {right}", is_sure=True):
            self.padding = self.padding.prepared(left, lengths, right)

    def finalize(self) -> None:
        """End the announced padding on the right; see `Padding.finalized`."""
        with self.edit("finalize", is_sure=True):
            self.padding = self.padding.finalized()

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order. A row that is named again is forked."""
        keep = [self._row(row) for row in keep]
        with self.edit(f"keep rows {keep}", is_sure=len(set(keep)) == len(keep)):
            kept = [
                self.conversations[row].fork() if row in keep[:place] else self.conversations[row]
                for place, row in enumerate(keep)
            ]
            self.conversations, self.padding = kept, self.padding.filtered(keep)

    def extend(self, other: Rows) -> None:
        """Append forks of the other's rows. Raises ValueError if they are in another pool."""
        with self.edit(f"take in {named(other)}"):
            self._check_joins(other)
            forks = [conversation.fork() for conversation in other.conversations]
            joined = [*self.conversations, *forks]
            self.conversations, self.padding = joined, self.padding.extended(other.padding)

    def merged(self, all_rows: Sequence[Rows]) -> Rows:
        """A batch of forks of all rows of `all_rows`. Raises ValueError if some are in another pool."""
        with self.edit("join " + ", ".join(map(named, all_rows))):
            for other in all_rows:
                self._check_joins(other)
            forks = [conversation.fork() for other in all_rows for conversation in other.conversations]
            return Rows(self.pool, forks, is_batch=True)

    def extracted(self, row: int) -> Rows:
        """A fork of one row, as a single conversation."""
        row = self._row(row)
        with self.edit(f"fork row {row}"):
            return Rows(self.pool, [self.conversations[row].fork()], is_batch=False)

    def fork(self) -> Rows:
        """Fork all rows, with their padding. Copies no array."""
        with self.edit("fork"):
            other = self.subset(range(len(self.conversations)), is_fork=True)
            other.padding = self.padding.filtered(range(len(self.conversations)))
            return other

    def subset(self, members: Sequence[int], is_fork: bool = False) -> Rows:
        """Some of the rows, or forks of them, without announced padding."""
        chosen = [self.conversations[row] for row in members]
        is_batch = self.is_batch and (is_fork or self.pool.batching != "apart")
        return Rows(self.pool, [c.fork() for c in chosen] if is_fork else chosen, is_batch)

    @contextmanager
    def edit(self, about: str, is_sure: bool = False) -> Iterator[None]:
        """Hold the pool's lock for an edit, on all ranks or none. Undoes an open forward first.

        Args:
            about: describes the edit to the other ranks; see `Ranks.together`.
            is_sure: the edit cannot fail, so that ranks vote before it instead of during it.

        Raises:
            RanksDisagreeError: another rank makes another edit, or cannot make it; nothing has changed.
        """
        with self.pool.lock:
            self.settle()
            with edit_together(self, about, is_sure):
                yield

    def quantize(self, quantization: Quantization) -> None:
        """Quantize keys and values from now on. Does nothing if they are quantized already.

        Raises:
            ValueError: the head dimension is not a multiple of the group size; nothing has changed.
        """
        with self.edit(f"store in fewer bits: {quantization}"):
            if self.pool.quantization is None:
                pool = self.pool.sibling(quantization)
                with pool.lock:
                    moved = [conversation.moved(pool) for conversation in self.conversations]
                    self.conversations, self.pool = moved, pool
                    pool.take_turn(self)

    def _row(self, row: int) -> int:
        """The index of a row, counted from 0. Raises ValueError if it is out of range."""
        (row,), size = whole(None, row=row), len(self.conversations)
        if not -size <= row < size:
            raise ValueError(f"row {row} is out of range: the batch has {size} rows")
        return row % size

    def _check_joins(self, other: Rows) -> None:
        # Only this pool's lock is held, so do not touch rows of another pool.
        if other.pool is not self.pool:
            raise ValueError(
                "prompt caches of different pools cannot join one batch: make them for the same model "
                "with the same options"
            )
        other.settle()

    def _length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """The number of columns of the model's input. Raises ValueError if rows or layers do not match."""
        given, layers = (*args, *kwargs.values()), len(self.pool.layout.entries)
        for value in given:
            if not isinstance(value, mx.array) and is_cache(value):
                if len(value) < layers:
                    raise ValueError(
                        f"the model is called with {len(value)} of the {layers} layers of its cache: pass "
                        "all of them"
                    )
                break
        for value in given:
            if isinstance(value, mx.array) and value.ndim >= 2 and value.shape[1]:
                if value.shape[0] != self._input_rows:
                    raise ValueError(
                        f"the input has {value.shape[0]} rows, but the prompt cache has {self._input_rows}"
                    )
                return value.shape[1]
        for value in given:
            if isinstance(value, mx.array):
                empty = "; pass at least 1 token" if not value.size else ""
                raise ValueError(f"tokens must be an array (batch, n), got shape {value.shape}{empty}")
        raise ValueError("the model is called without tokens: pass an array (batch, n)")
