"""Arithmetic on runs of cells, against the same on single positions."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvcache.cells.spans import (
    EMPTY,
    FOREVER,
    Sequence,
    Span,
    Spans,
    clip,
    count,
    covers,
    join,
    laid_out,
    moved,
    resumable,
    seen_from,
    union,
)
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window, visible

RULES = st.sampled_from([Causal(), Window(1), Window(3), Window(4, 2), Window(5, 1), Chunk(1), Chunk(4)])
exhaustive = settings(max_examples=100, deadline=None, derandomize=True, database=None)

Cells = dict[int, tuple[int, int]]
"""By position: the segment and the cell."""


@st.composite
def spans_of(draw: st.DrawFn) -> Spans:
    """Spans by rising position, in a few segments, with and without gaps."""
    position, found = 0, list[Span]()
    for _ in range(draw(st.integers(0, 4))):
        position += draw(st.sampled_from([0, 0, 1, 3]))
        length = draw(st.integers(1, 4))
        segment, start = draw(st.integers(1, 2)), draw(st.integers(0, 20))
        last = found[-1] if found else None
        if last and draw(st.booleans()):
            segment, start = last.segment, last.stop
        found.append(Span(segment, start, position, length))
        position += length
    return tuple(found)


def cells_of(spans: Spans) -> Cells:
    return {span.position + i: (span.segment, span.start + i) for span in spans for i in range(span.length)}


def test_a_span() -> None:
    span = Span(segment=3, start=5, position=7, length=4)
    assert (span.stop, span.end) == (9, 11)
    assert Sequence(0, ()) == EMPTY and EMPTY.end == 0 and not EMPTY.spans
    assert sys.maxsize == FOREVER


@exhaustive
@given(spans_of())
def test_count(spans: Spans) -> None:
    assert count(spans) == len(cells_of(spans))


@exhaustive
@given(spans_of(), st.integers(0, 20), st.integers(0, 20))
def test_clip(spans: Spans, begin: int, end: int) -> None:
    kept = clip(spans, begin, end)
    assert cells_of(kept) == {p: cell for p, cell in cells_of(spans).items() if begin <= p < end}
    assert all(span.length > 0 for span in kept)
    assert clip(spans, begin) == clip(spans, begin, FOREVER)
    assert clip(spans, 0) == spans


def test_clip_of_one_span_that_stays_whole() -> None:
    """It is the same object: decoding asks this at every step."""
    spans = (Span(1, 5, 2, 4),)
    for begin, end in ((0, 6), (2, 6), (2, 100)):
        assert clip(spans, begin, end) is spans
    assert clip(spans, 3, 6) == (Span(1, 6, 3, 3),)
    assert clip(spans, 2, 5) == (Span(1, 5, 2, 3),)
    assert clip(spans, 6, 9) == clip(spans, 0, 2) == clip(spans, 4, 4) == ()


@exhaustive
@given(RULES, spans_of(), st.integers(0, 20))
def test_seen_from(rule: Rule, spans: Spans, position: int) -> None:
    """What any token from a position on sees, itself and later ones included."""
    seen = cells_of(seen_from(rule, spans, position))
    expected = {
        p: cell
        for p, cell in cells_of(spans).items()
        if p >= position or any(visible(rule, q, p) for q in range(position, position + 5))
    }
    assert seen == expected
    if rule.lower(position) <= 0:
        assert seen_from(rule, spans, position) is spans


@exhaustive
@given(spans_of(), st.integers(0, 15), st.integers(0, 15))
def test_covers(spans: Spans, begin: int, end: int) -> None:
    assert covers(spans, begin, end) == (set(range(begin, end)) <= cells_of(spans).keys())


@exhaustive
@given(RULES, spans_of(), st.integers(0, 20))
def test_resumable(rule: Rule, spans: Spans, position: int) -> None:
    needed = {p for p in range(position) if visible(rule, position, p)}
    assert resumable(rule, spans, position) == (needed <= cells_of(spans).keys())


@exhaustive
@given(spans_of(), st.integers(-9, 9))
def test_moved(spans: Spans, by: int) -> None:
    assert cells_of(moved(spans, by)) == {p + by: cell for p, cell in cells_of(spans).items()}
    assert len(moved(spans, by)) == len(spans)


@exhaustive
@given(spans_of())
def test_join(spans: Spans) -> None:
    joined = join(spans)
    assert cells_of(joined) == cells_of(spans)
    for one, other in pairwise(joined):
        assert (one.segment, one.stop, one.end) != (other.segment, other.start, other.position)


@pytest.mark.parametrize(
    ("other", "is_joined"),
    [
        (Span(1, 4, 14, 2), True),
        (Span(2, 4, 14, 2), False),
        (Span(1, 5, 14, 2), False),
        (Span(1, 4, 15, 2), False),
    ],
)
def test_join_needs_neighbors_in_all(other: Span, is_joined: bool) -> None:
    spans = (Span(1, 0, 10, 4), other)
    assert join(spans) == ((Span(1, 0, 10, 6),) if is_joined else spans)


@exhaustive
@given(spans_of(), st.integers(0, 9))
def test_laid_out(spans: Spans, start: int) -> None:
    positions = sorted(cells_of(spans))
    placed = laid_out(7, start, spans)
    assert cells_of(placed) == {p: (7, start + i) for i, p in enumerate(positions)}
    assert placed == join(placed)


@exhaustive
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)).map(lambda pair: (pair[0], sum(pair)))))
def test_union(intervals: list[tuple[int, int]]) -> None:
    merged = union(intervals)
    assert {c for low, high in merged for c in range(low, high)} == {
        c for low, high in intervals for c in range(low, high)
    }
    for (_, before), (after, _) in pairwise(merged):
        assert before < after, "neighbors are one interval"
    assert union(reversed(intervals)) == merged
