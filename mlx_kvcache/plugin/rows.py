"""What the layers of one cache list share: their sequences, and what is done with them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arguments import whole
from ..caches.plan import JointPlan
from ..quantisation import Quantisation
from .apart import groups, is_one_input, run_apart
from .observe import Call, Caller, is_cache
from .padding import Columns
from .passes import Passes
from .together import edit_together, forward_together, named, unless_all_can


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

    def quantise(self, quantisation: Quantisation) -> None:
        """Store keys and values in fewer bits from here on, if they are in the model's precision.

        Raises:
            ValueError: heads that groups do not divide; nothing has changed.
        """
        with self.edit(f"store in fewer bits: {quantisation}"):
            if self.pool.quantisation is None:
                pool = self.pool.sibling(quantisation)
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
