"""Tells a model the positions of its tokens in a call, if they have several axes, and notes them.

See `rope/axes.py`. All other models read positions from the offsets of their cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..pool.conversation import Conversation
from ..pool.pool import Pool
from ..rope.axes import ARGUMENT, Relative, forget_positions, relative_of
from .forward import Columns, Forward


class Positioned(Protocol):
    """Rows of a call's input."""

    pool: Pool
    conversations: list[Conversation]
    forward: Forward | None

    @property
    def positions(self) -> list[int]: ...


def told_by(
    rows: Positioned, columns: Sequence[Columns], n: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Relative | None:
    """What a call says about the positions of its n columns on several axes; None if it says nothing."""
    model, axes = rows.pool.living_model, rows.pool.axes
    if axes is None:
        forget_positions(model, kwargs)
        return None
    tokens = rows.positions
    pairs = zip(rows.conversations, tokens, strict=True)
    expected = [before + conversation.head.deltas.at(before) for conversation, before in pairs]
    return relative_of(model, axes, tokens, expected, columns, n, args, kwargs)


def argument(
    rows: Positioned, columns: Sequence[Columns], n: int, relative: Relative | None
) -> dict[str, mx.array]:
    """The argument that tells the model the positions of the forward's tokens; empty if it has one axis."""
    axes, forward = rows.pool.axes, rows.forward
    if axes is None:
        return {}
    assert forward is not None
    pairs = zip(rows.conversations, forward.begins, strict=True)
    starts = [conversation.next_position(begin) for conversation, begin in pairs]
    if relative is not None:
        return {ARGUMENT: axes.argument(relative.array + np.array(starts)[:, None])}
    if forward.is_by_token:
        every = [range(start, start + count) for start, (_, count) in zip(starts, columns, strict=True)]
        return {ARGUMENT: axes.plain([position for own in every for position in own], n)}
    return {
        ARGUMENT: axes.plain([start - first for start, (first, _) in zip(starts, columns, strict=True)], n)
    }


def note(rows: Positioned, columns: Sequence[Columns], relative: Relative) -> None:
    """Keep how far the positions of the forward's tokens are from those of text."""
    assert rows.forward is not None
    for row, (conversation, (first, stop)) in enumerate(zip(rows.conversations, columns, strict=True)):
        own = relative.array[:, row, first:stop]
        if (own != np.arange(stop - first)).any():
            head = conversation.head
            deltas = head.deltas.grown(rows.forward.begins[row], own)
            conversation.head = replace(head, deltas=deltas)
