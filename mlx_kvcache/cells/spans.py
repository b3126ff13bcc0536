"""Spans, which are runs of cells of one sequence, and pure functions on tuples of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from .visibility import Rule

FOREVER = sys.maxsize


class Span(NamedTuple):
    """The cells [start, start + length) of a segment, which hold the positions from `position` on."""

    segment: int
    start: int
    position: int
    length: int

    @property
    def stop(self) -> int:
        """The cell after the last one."""
        return self.start + self.length

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.position + self.length


Spans = tuple[Span, ...]


class Sequence(NamedTuple):
    """A sequence: the position after its last token, and the spans of the tokens that are stored.

    Spans are in order of position and do not overlap. They may start after position 0, have gaps, and stop
    before `end`: a window of one token may hold no cells.
    """

    end: int
    spans: Spans


EMPTY = Sequence(0, ())


def count(spans: Iterable[Span]) -> int:
    """Returns the number of cells in the spans."""
    return sum(span.length for span in spans)


def clip(spans: Spans, begin: int, end: int = FOREVER) -> Spans:
    """Returns the part of the spans at positions [begin, end)."""
    if len(spans) == 1:
        _, _, position, length = spans[0]
        if begin <= position and position + length <= end:
            return spans
    kept = []
    for segment, start, position, length in spans:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            kept.append(Span(segment, start + low - position, low, high - low))
    return tuple(kept)


def seen_from(rule: Rule, spans: Spans, position: int) -> Spans:
    """Returns the part of the spans that tokens at `position` or later may see."""
    low = max(0, rule.lower(position))
    if not low:
        return spans
    return clip(spans, 0, min(rule.sinks, low)) + clip(spans, low) if rule.sinks else clip(spans, low)


def covers(spans: Spans, begin: int, end: int) -> bool:
    """Returns whether the spans hold every position in [begin, end)."""
    for span in spans:
        if span.position <= begin < span.end:
            begin = span.end
    return begin >= end


def resumable(rule: Rule, spans: Spans, position: int) -> bool:
    """Returns whether the spans hold every position below `position` that tokens from there on may see."""
    low = max(0, rule.lower(position))
    return covers(spans, low, position) and covers(spans, 0, min(rule.sinks, low))


def moved(spans: Spans, by: int) -> Spans:
    """Returns the same cells with all positions raised by `by`."""
    return tuple(span._replace(position=span.position + by) for span in spans)


def join(spans: Spans) -> Spans:
    """Merges neighboring spans with consecutive cells and positions."""
    if len(spans) < 2:
        return spans
    joined = [spans[0]]
    for span in spans[1:]:
        last = joined[-1]
        if (last.segment, last.stop, last.end) == (span.segment, span.start, span.position):
            joined[-1] = last._replace(length=last.length + span.length)
        else:
            joined.append(span)
    return tuple(joined)


def laid_out(segment: int, start: int, spans: Spans) -> Spans:
    """Returns the positions of `spans` in consecutive cells of `segment` from `start` on."""
    placed = []
    for span in spans:
        placed.append(Span(segment, start, span.position, span.length))
        start += span.length
    return join(tuple(placed))


def union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merges half-open intervals into disjoint ones, in rising order."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
