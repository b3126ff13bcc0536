"""Positions on several axes: what a conversation keeps, against positions that are counted afresh."""

from __future__ import annotations

from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin.rope.axes import Axes, Deltas, Prompt, Relative, axes_of, relative_of

Item = tuple[int, int, int, int]
"""A token: the number of its picture, or -1 for text, and its place in the picture."""
TEXT: Item = (-1, 0, 0, 0)


def positions_of(items: list[Item]) -> tuple[np.ndarray[Any, Any], int]:
    """The positions (axes, n) of the tokens as a model counts them, and that of text after them."""
    found, free, base, before = [], 0, 0, -1
    for picture, *place in items:
        if picture < 0 or picture != before:
            base = free
        found.append([base + step for step in place])
        free, before = max(free, max(found[-1]) + 1), picture
    return np.array(found, np.int64).reshape(-1, 3).T, free


def picture(number: int, frames: int, height: int, width: int) -> list[Item]:
    return [(number, t, h, w) for t in range(frames) for h in range(height) for w in range(width)]


PIECES = st.one_of(
    st.integers(1, 5).map(lambda n: [TEXT] * n),
    st.tuples(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)).map(
        lambda own: picture(*own)
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_edits_against_counting(data: st.DataObject) -> None:
    items: list[Item] = []
    deltas, numbers = Deltas(), count()
    for _ in range(data.draw(st.integers(1, 6))):
        act = data.draw(st.sampled_from(["append", "append", "cut", "remove"]))
        if act == "append":
            pieces = data.draw(st.lists(PIECES, min_size=1, max_size=3))
            # Neighbors with one number would be one picture once what is between them is removed.
            new = items + [
                (item[0] if item[0] < 0 else number, *item[1:])
                for piece, number in zip(pieces, numbers, strict=False)
                for item in piece
            ]
            positions, _ = positions_of(new)
            # A block may end inside a picture.
            border = data.draw(st.integers(len(items), len(new)))
            for first, stop in ((len(items), border), (border, len(new))):
                _, free = positions_of(new[:first])
                deltas = deltas.grown(first, positions[:, first:stop] - free)
            items = new
        elif act == "cut":
            length = data.draw(st.integers(0, len(items)))
            items, deltas = items[:length], deltas.cut(length)
        elif items:
            begin = data.draw(st.integers(0, len(items) - 1))
            end = data.draw(st.integers(begin + 1, len(items)))
            before, after = positions_of(items[:begin])[1], positions_of(items[:end])[1]
            try:
                left, moved = deltas.without(begin, end)
            except NotSupportedError:
                assert any(own in deltas.inside for own in (begin, end))
                continue
            assert moved == after - before
            items, deltas = items[:begin] + items[end:], left
        for tokens in range(len(items) + 1):
            assert deltas.at(tokens) == positions_of(items[:tokens])[1] - tokens


def test_positions_of_a_whole_prompt_are_cut_to_the_call() -> None:
    axes, items = Axes(is_last=False, is_flat=False), [TEXT] * 3 + picture(0, 1, 2, 2) + [TEXT] * 4
    positions, _ = positions_of(items)
    whole = axes.argument(positions[:, None])
    for begin, end in ((0, 11), (0, 5), (5, 9), (8, 11)):
        prompt = Prompt(whole, [0])
        told = relative_of(axes, prompt, [begin], [0], [(0, end - begin)], end - begin, None, ())
        assert told is not None
        expected = positions[:, begin:end] - positions_of(items[:begin])[1]
        assert (told.array[:, 0] == expected).all()


@pytest.mark.parametrize("before", [2, 6, 30])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_prompt_that_follows_others_in_small_blocks(before: int, is_whole: bool) -> None:
    """Its positions count from its own beginning, or from that of the tokens before it."""
    axes = Axes(is_last=False, is_flat=False)
    items = [TEXT] * 8 + picture(0, 1, 2, 3) + [TEXT] * 5
    earlier = [TEXT] * before
    ids = [i + 1 if item == TEXT else 99 for i, item in enumerate(items)]
    positions, _ = positions_of(earlier + items)
    given = axes.argument((positions if is_whole else positions_of(items)[0])[:, None])
    for size in (1, 3, 4, 7):
        prompt = Prompt(given, [before])
        for done in range(0, len(items) - size, size):
            tokens = before + done
            inputs = mx.array([ids[done : done + size]])
            columns = [(0, size)]
            told = relative_of(axes, prompt, [tokens], [0], columns, size, inputs, {99})
            expected = positions[:, tokens : tokens + size] - positions_of((earlier + items)[:tokens])[1]
            assert told is not None and (told.array[:, 0] == expected).all()


def test_parts_of_a_call() -> None:
    items = [TEXT] * 2 + picture(0, 2, 1, 2) + [TEXT] * 2
    positions, _ = positions_of(items)
    told = Relative(np.stack([positions, positions], axis=1))
    for begin in range(len(items)):
        part = told.part([1], begin, len(items))
        assert (part.array[:, 0] == positions[:, begin:] - positions_of(items[:begin])[1]).all()


def test_a_model_that_cannot_be_told() -> None:
    class Hidden:
        _rope_deltas = None

    with pytest.raises(NotSupportedError, match="several conversations would share"):
        axes_of(Hidden())  # type: ignore[arg-type]
    assert axes_of(mx) is None  # type: ignore[arg-type]
