"""Positions of models whose tokens have a position on each of several axes (M-RoPE).

Such a model (Qwen2-VL and others) gives each token of a picture a time, a row and a column, and text the same
number on all axes. The text after a picture goes on at the largest number so far, so positions are not the
number of tokens before. The model keeps the difference on its module, one for all conversations. Here each
conversation keeps its own, and every call of the model is told the positions of its tokens.

Source: "Qwen2-VL", arXiv:2409.12191, section 2.1.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ...errors import NotSupportedError

AXES = 3
ARGUMENT = "position_ids"
_PICTURES = ("image_grid_thw", "video_grid_thw")
_PROBED = 5
"""Number of tokens of which a model is asked the positions. Differs from `AXES`."""


class Axes(NamedTuple):
    """How a model takes positions: with shape (axes, B, n), or (B, n, axes) if `is_last`.

    Attributes:
        is_flat: whether it takes those of text with shape (B, n).
    """

    is_last: bool
    is_flat: bool

    def plain(self, starts: Sequence[int], n: int) -> mx.array:
        """Positions of n tokens of text in each row."""
        rows = mx.array(list(starts), mx.int32)[:, None] + mx.arange(n, dtype=mx.int32)
        return rows if self.is_flat else mx.stack([rows] * AXES, axis=-1 if self.is_last else 0)

    def argument(self, positions: NDArray[np.int64]) -> mx.array:
        """Positions (axes, B, n) as the model takes them."""
        return mx.array(np.moveaxis(positions, 0, -1) if self.is_last else positions, mx.int32)

    def read(self, argument: mx.array) -> NDArray[np.int64]:
        """An argument of the model as positions (axes, B, n)."""
        array = np.array(argument).astype(np.int64)
        if array.ndim == 2:
            return np.stack([array] * AXES)
        return np.moveaxis(array, -1, 0) if self.is_last else array


def axes_of(model: nn.Module) -> Axes | None:
    """Return how a model takes positions on several axes; None if it does not.

    Raises:
        NotSupportedError: the model keeps positions on its module, but cannot be told them.
    """
    if not hasattr(model, "_rope_deltas"):
        return None
    index = getattr(model, "get_rope_index", None)
    if index is None:
        raise NotSupportedError(
            f"{type(model).__module__} keeps positions on its module, in _rope_deltas, but has no "
            "get_rope_index to find them by, so that several conversations would share them"
        )
    try:
        positions, _ = index(mx.arange(_PROBED)[None])
    except AttributeError:
        # A language model without the configuration of its vision tower can still be told positions.
        return Axes(is_last=False, is_flat=True)
    is_flat = positions.ndim == 2
    return Axes(not is_flat and positions.shape[1] == _PROBED, is_flat)


def forget_positions(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Drop what a model that is not told positions has kept of another conversation's prompt.

    A prompt's embeddings come with positions that the model has kept just before.
    """
    if getattr(model, "_position_ids", None) is not None and kwargs.get("inputs_embeds") is None:
        model._position_ids = None


@dataclass(frozen=True)
class Deltas:
    """How far positions are from the numbers of tokens before them, in one conversation.

    Attributes:
        steps: (number of tokens, difference from there on), in order; the difference is 0 before the first.
        inside: numbers of tokens after which a picture is not complete, in order.
    """

    steps: tuple[tuple[int, int], ...] = ()
    inside: tuple[int, ...] = ()

    def at(self, tokens: int) -> int:
        """The difference of the next token's position from the number of tokens."""
        index = bisect.bisect_right(self.steps, tokens, key=lambda step: step[0])
        return self.steps[index - 1][1] if index else 0

    def border(self, tokens: int) -> int:
        """The first number of tokens >= `tokens` after which all pictures are complete."""
        while tokens in self.inside:
            tokens += 1
        return tokens

    def cut(self, length: int) -> Deltas:
        """The differences within the first `length` tokens."""
        if self == NO_DELTAS:
            return self
        return Deltas(
            tuple(step for step in self.steps if step[0] <= length),
            tuple(tokens for tokens in self.inside if tokens < length),
        )

    def grown(self, tokens: int, relative: NDArray[np.int64]) -> Deltas:
        """Append the positions (axes, n) of the next n tokens, relative to where text would go on."""
        steps, inside, ahead = list(self.steps), list(self.inside), 0
        first = self.at(tokens)
        for i, column in enumerate(relative.T):
            if (column != ahead).any():
                inside.append(tokens + i)
            ahead = max(ahead, int(column.max()) + 1)
            delta = first + ahead - (i + 1)
            if delta != (steps[-1][1] if steps else 0):
                steps.append((tokens + i + 1, delta))
        return Deltas(tuple(steps), tuple(inside))

    def without(self, begin: int, end: int) -> tuple[Deltas, int]:
        """Remove the tokens [begin, end).

        Returns:
            The differences that remain, and by how much positions move.

        Raises:
            NotSupportedError: a part of a picture would remain.
        """
        if self == NO_DELTAS:
            return self, end - begin
        for border in (begin, end):
            if border in self.inside:
                raise NotSupportedError(
                    f"cannot remove [{begin}, {end}): position {border} is inside a picture; remove whole "
                    "pictures"
                )
        more, gap = self.at(end) - self.at(begin), end - begin
        kept = [step for step in self.steps if step[0] <= begin]
        for tokens, delta in self.steps:
            if tokens > end and delta - more != (kept[-1][1] if kept else 0):
                kept.append((tokens - gap, delta - more))
        inside = [own if own < begin else own - gap for own in self.inside if not begin <= own < end]
        return Deltas(tuple(kept), tuple(inside)), gap + more


NO_DELTAS = Deltas()


class Relative(NamedTuple):
    """Positions (axes, B, n) of a call's tokens, relative to the position that text would get there.

    Columns of padding have -1.
    """

    array: NDArray[np.int64]

    def part(self, rows: Sequence[int], begin: int, end: int) -> Relative:
        """Those of some rows and columns, relative to their own beginning."""
        chosen = self.array[:, list(rows)]
        before = np.array([_after(chosen[:, row, :begin]) for row in range(len(rows))])
        return Relative(chosen[..., begin:end] - before[:, None])


class Prompt:
    """The positions of a prompt, of which calls compute parts.

    Args:
        given: the array, which calls for the next parts pass again.
        begins: for each row, the number of tokens before the first call.

    Attributes:
        origins: for each row, the number of tokens before the first position of the array: 0 or that in
            `begins`. None as long as it does not matter.
    """

    def __init__(self, given: mx.array, begins: list[int]) -> None:
        self.given = given
        self.begins = begins
        self.origins: list[int | None] = [None] * len(begins)


def prompt_of(
    model: Any, tokens: list[int], known: Prompt | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Prompt | None:
    """Return the positions that a call is told, on several axes; None if it is told none.

    Args:
        tokens: the number of tokens before the call, of each row.
        known: what the call before was told.
    """
    given = kwargs.get(ARGUMENT)
    if given is None and kwargs.get("inputs_embeds") is not None:
        # Some models leave them here while they compute the embeddings of a prompt with pictures.
        given = getattr(model, "_position_ids", None)
    if given is None and any(kwargs.get(name) is not None for name in _PICTURES):
        grids = (kwargs.get(name) for name in _PICTURES)
        given, _ = model.get_rope_index(_inputs(args, kwargs), *grids, kwargs.get("mask"))
    if given is None:
        return None
    if known and known.given is given and all(map(int.__le__, known.begins, tokens)):
        return known
    return Prompt(given, tokens)


def relative_of(
    axes: Axes,
    prompt: Prompt,
    tokens: Sequence[int],
    expected: Sequence[int],
    columns: Sequence[tuple[int, int]],
    n: int,
    inputs: mx.array | None,
    marks: Collection[int],
) -> Relative | None:
    """Return the positions of a call's n columns; None if the prompt's do not have their shape.

    A tool gives the positions of a whole prompt, or of what follows the tokens in the cache, and for all of
    it, or for the part that the call computes. The tokens that stand for pictures tell which.

    Args:
        tokens: the number of tokens before the call, of each row.
        expected: the position of the next token of each row, as if no tokens had been removed.
        columns: the columns of each row that are tokens.
        inputs: the call's tokens (B, n).
        marks: the tokens that stand for pictures.
    """
    positions = axes.read(prompt.given)
    length, relative = positions.shape[-1], np.full((AXES, len(tokens), n), -1, np.int64)
    if positions.shape[1] != len(tokens) or length < n:
        return None
    ids = None if inputs is None else np.array(inputs)
    for row, (first, stop) in enumerate(columns):
        own, before = positions[:, row], tokens[row]
        if length == n:
            own = own[:, first:stop]
            relative[:, row, first:stop] = own - (expected[row] if before and own[:, :1].any() else 0)
            continue
        known = prompt.origins[row]
        parts = {
            origin: own[:, before - origin : before - origin + n] - _after(own[:, : before - origin])
            for origin in ((0, prompt.begins[row]) if known is None else (known,))
            if before - origin + n <= length
        }
        if not parts:
            return None
        fitting = [o for o, part in parts.items() if ids is None or _fits(part, ids[row], marks)]
        if len(fitting) == 1:
            prompt.origins[row] = fitting[0]
        relative[:, row] = parts[(fitting or [*parts])[0]]
    return Relative(relative)


def _fits(relative: NDArray[np.int64], ids: NDArray[Any], marks: Collection[int]) -> bool:
    """Whether only tokens that stand for pictures have different positions on the axes."""
    differ = (relative != relative[0]).any(axis=0)
    return set(ids[differ].tolist()) <= set(marks)


def _marks(model: Any) -> set[int]:
    """The tokens that stand for pictures and videos, from a model's configuration."""
    config = getattr(model, "config", None)
    names = (f"{kind}_token_{which}" for kind in ("image", "video") for which in ("id", "index"))
    found = (getattr(config, name, None) for name in names)
    return {token for token in found if isinstance(token, int)}


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> mx.array | None:
    """The tokens (B, n) among the arguments of a call."""
    for value in (*args, *(kwargs.get(name) for name in ("inputs", "input_ids"))):
        if isinstance(value, mx.array) and value.ndim == 2 and not mx.issubdtype(value.dtype, mx.floating):
            return value
    return None


def _after(positions: NDArray[np.int64]) -> int:
    """The position of text after these (axes, n)."""
    return int(positions.max(initial=-1)) + 1


def told_by(
    rows: Any, columns: Sequence[tuple[int, int]], n: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Relative | None:
    """What a call says about the positions of its n columns on several axes; None if it says nothing.

    Args:
        rows: the `Rows` of the call's input.
    """
    model, axes = rows.pool.living_model, rows.pool.axes
    if axes is None:
        forget_positions(model, kwargs)
        return None
    given = kwargs.get(ARGUMENT)
    if isinstance(given, Relative):
        return given
    tokens = rows.positions
    rows.prompt = prompt_of(model, tokens, rows.prompt, args, kwargs)
    if rows.prompt is None:
        return None
    pairs = zip(rows.conversations, tokens, strict=True)
    expected = [before + conversation.head.deltas.at(before) for conversation, before in pairs]
    return relative_of(axes, rows.prompt, tokens, expected, columns, n, _inputs(args, kwargs), _marks(model))


def argument(rows: Any, columns: Sequence[tuple[int, int]], n: int, relative: Relative | None) -> mx.array:
    """The argument that tells the model the positions of the tokens of the rows' forward."""
    axes: Axes = rows.pool.axes
    forward = rows.forward
    pairs = zip(rows.conversations, forward.begins, strict=True)
    starts = [conversation.next_position(begin) for conversation, begin in pairs]
    if relative is not None:
        return axes.argument(relative.array + np.array(starts)[:, None])
    firsts: list[int] = []
    for start, (first, stop) in zip(starts, columns, strict=True):
        firsts += range(start, start + stop) if forward.is_by_token else [start - first]
    return axes.plain(firsts, n)


def note(rows: Any, columns: Sequence[tuple[int, int]], relative: Relative) -> None:
    """Keep how far the positions of the forward's tokens are from those of text."""
    for row, (conversation, (first, stop)) in enumerate(zip(rows.conversations, columns, strict=True)):
        own = relative.array[:, row, first:stop]
        if (own != np.arange(stop - first)).any():
            head = conversation.head
            deltas = head.deltas.grown(rows.forward.begins[row], own)
            conversation.head = replace(head, deltas=deltas)
