"""Divides a call of the model into blocks of columns, which are forwards of their own.

Between two blocks a shift makes room, tokens of a splice join, or recurrent layers leave a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..hosts.host import joined
from ..hosts.observe import Call, is_cache
from ..rope.axes import Relative
from .forward import Columns, cuts_of
from .row_groups import Divisible, indivisible, is_undivided


class InBlocks(Divisible, Protocol):
    """Rows whose call can be divided. `is_divided` says that it has been."""

    is_divided: bool

    @property
    def positions(self) -> list[int]: ...


def edges(rows: InBlocks, columns: Sequence[Columns], n: int) -> Sequence[int]:
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


def run(
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
