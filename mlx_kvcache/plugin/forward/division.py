"""Divides a call of the model into blocks of columns, or into groups of rows, each a forward of its own.

Between two blocks a shift makes room, tokens of a splice join, or recurrent layers leave a checkpoint.

Rows are divided where they cannot share an input. Recurrences read every column, and only some of mlx-lm's
accept a mask for padding. So rows that differ in padding, or in the shapes of their states, are separate
calls of the model. If a model computes a batch differently from its single rows, each row is a separate call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...arguments import class_of
from ...errors import NotSupportedError
from ..hosts.host import joined
from ..hosts.observe import Call, Caller, is_cache
from ..pool.conversation import Conversation
from ..pool.pool import Pool
from ..rope.axes import Relative
from .forward import Columns, cuts_of, newest


class Divisible(Caller, Protocol):
    """Rows of one input that can be divided into several inputs."""

    pool: Pool
    conversations: list[Conversation]

    def subset(self, members: Sequence[int]) -> Divisible: ...


class InBlocks(Divisible, Protocol):
    """Rows whose call can be divided. `is_divided` says that it has been."""

    is_divided: bool

    @property
    def positions(self) -> list[int]: ...


def edges_of(rows: InBlocks, columns: Sequence[Columns], n: int) -> Sequence[int]:
    """Return the columns at which to divide a call of n columns, with both ends."""
    pairs = zip(rows.conversations, columns, strict=True)
    blocks = (conversation.block(stop - first) for conversation, (first, stop) in pairs)
    block = min(filter(None, blocks), default=n)
    if block < n:
        return [*range(0, n, block), n]
    if len(columns) == 1 and rows.conversations[0].waiting:
        first, stop = columns[0]
        return [0, *(first + edge for edge in rows.conversations[0].edges(stop - first)), n]
    if n == 1 or rows.is_divided or not any(own.is_nested for own in rows.pool.mixers.values()):
        return [0, n]
    # Modules that cannot give recurrent states inside a block.
    return [0, *cuts_of(rows.pool, rows.conversations, rows.positions, n), n]


def run_in_blocks(
    rows: InBlocks,
    at: Sequence[int],
    model: nn.Module,
    call: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call the model on blocks of columns, one after another, and join the outputs."""
    outputs, before = [], rows.is_divided
    rows.is_divided = True
    try:
        for begin, end in pairwise(at):
            block = functools.partial(_columns, at[-1], slice(begin, end))
            named = {name: block(value) for name, value in kwargs.items()}
            outputs.append(rows.run(model, call, tuple(map(block, args)), named))
    finally:
        rows.is_divided = before
    return joined(outputs, lambda arrays: mx.concatenate(arrays, axis=1))


def _columns(n: int, block: slice, argument: Any) -> Any:
    """An argument of the model's call, cut to some of its n columns."""
    if isinstance(argument, Relative):
        return argument.part(range(argument.array.shape[1]), block.start, block.stop)
    if is_cache(argument) or is_undivided(argument):
        return argument
    if isinstance(argument, mx.array) and argument.ndim >= 2 and argument.shape[1] == n:
        return argument[:, block]
    raise indivisible(argument, (1, n))


def needs_groups(rows: Divisible, columns: Sequence[Columns]) -> bool:
    """Whether rows may not be able to share an input.

    A row that tokens of a splice join in the middle of its new ones is divided, and others are not.
    """
    if rows.pool.layout.is_recurrent or rows.pool.batching == "apart":
        return True
    pairs = zip(rows.conversations, columns, strict=True)
    return any(own.edges(stop - first) for own, (first, stop) in pairs)


def groups(rows: Divisible, columns: Sequence[Columns]) -> dict[object, list[int]]:
    """Groups of rows that can share an input. Rows without tokens are left out."""
    found: dict[object, list[int]] = {}
    for row, (first, stop) in enumerate(columns):
        if first < stop:
            is_alone = rows.pool.batching == "apart" or rows.conversations[row].edges(stop - first)
            own = row if is_alone else _form(rows, row)
            found.setdefault((first, stop, own), []).append(row)
    return found


def is_one_input(
    rows: Divisible, together: Mapping[object, list[int]], columns: Sequence[Columns], n: int
) -> bool:
    """Whether all rows are in one group, have no padding, and the model computes batches correctly."""
    all_alike = len(together) == 1 and len(next(iter(together.values()))) == len(columns)
    return rows.pool.batching != "apart" and all_alike and columns[0] == (0, n)


def run_apart(
    rows: Divisible,
    together: Mapping[object, list[int]],
    columns: Sequence[Columns],
    n: int,
    call: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call the model once for each group and join the outputs; padding has zeros as output."""
    outputs = []
    for members in together.values():
        first, stop = columns[members[0]]
        some = rows.subset(members)
        given = functools.partial(_of_rows, some, members, (first, stop), (len(columns), n))
        named = {name: given(value) for name, value in kwargs.items()}
        outputs.append(some.run(rows.pool.living_model, call, tuple(map(given, args)), named))
    return joined(outputs, lambda arrays: _in_place(arrays, list(together.values()), columns, n))


def _in_place(
    arrays: Sequence[mx.array], groups_of: Sequence[list[int]], columns: Sequence[Columns], n: int
) -> mx.array:
    """Join the groups' arrays (members, own columns, ...) to one array of all rows and columns."""
    found: dict[int, mx.array] = {}
    for array, members in zip(arrays, groups_of, strict=True):
        first, stop = columns[members[0]]
        edges = [(0, 0), (first, n - stop)] + [(0, 0)] * (array.ndim - 2)
        for index, row in enumerate(members):
            found[row] = mx.pad(array[index : index + 1], edges)
    like = next(iter(found.values()))
    return mx.concatenate([found.get(row, mx.zeros_like(like)) for row in range(len(columns))])


def _of_rows(
    rows: Divisible, members: Sequence[int], columns: Columns, shape: tuple[int, int], argument: Any
) -> Any:
    """An argument of the model's call, whose input has this shape, cut to these members and columns."""
    if isinstance(argument, Relative):
        return argument.part(members, *columns)
    if is_cache(argument):
        return [entry.served_by(rows) for entry in argument]
    if is_undivided(argument):
        return argument
    if isinstance(argument, mx.array) and argument.shape[0] == shape[0]:
        own = argument[mx.array(list(members))]
        if argument.ndim == 1 or argument.shape[1] != shape[1]:
            return own
        return own[:, columns[0] : columns[1]]
    raise indivisible(argument, shape)


def _form(rows: Divisible, row: int) -> tuple[object, ...]:
    """The shapes of a row's recurrent arrays."""
    conversation = rows.conversations[row]
    return tuple(
        tuple(None if array is None else array.shape for array in newest(conversation, leaf))
        for leaf in rows.pool.leaves
        if leaf.rule is None
    )


def is_undivided(argument: Any) -> bool:
    """Whether an argument of a call is the same for all of its rows and columns."""
    if isinstance(argument, (list, tuple)):
        return all(map(is_undivided, argument))
    return not isinstance(argument, mx.array) or not argument.ndim


def indivisible(argument: Any, shape: tuple[int, ...]) -> NotSupportedError:
    """The error of a call that must be divided, with an argument that cannot be."""
    found = f"of shape {argument.shape}" if isinstance(argument, mx.array) else class_of(argument)
    return NotSupportedError(
        f"the rows or blocks of this call must be computed one after another, and an argument {found} cannot "
        f"be divided like the input of shape {shape}: call the model for one row or block at a time"
    )
