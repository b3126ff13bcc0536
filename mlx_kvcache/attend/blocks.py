"""A long block of queries, cut where what they see changes, so that less is multiplied and then hidden."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from ..cells.visibility import Causal, Chunk, Rule
from ..storage import codec
from ..storage.masks import Mask, array_mask, positions_of
from .part import Part
from .products import STRETCH

SHORTEST = 64
"""Queries in a stretch at least; fewer are not worth a product of their own."""


class Stretch(NamedTuple):
    """Neighboring queries of a part, the keys that any of them sees, and who sees which."""

    queries: slice
    keys: slice
    mask: Mask


def cut(rule: Rule, part: Part, whole: Stretch) -> list[Stretch]:
    """A part's queries, by rising position, in stretches; in one where more would not help."""
    borders = _borders(rule, part)
    return [_stretch(rule, part, a, b) for a, b in pairwise(borders)] if len(borders) > 2 else [whole]


def _borders(rule: Rule, part: Part) -> list[int]:
    """Positions at which a new stretch begins, and the end."""
    whole = [part.begin, part.end]
    if rule.sinks or any(before[1] != after[0] for before, after in pairwise(part.ranges)):
        return whole
    if isinstance(rule, Causal):
        return [*range(part.begin, part.end, STRETCH), part.end] if codec.is_cpu() else whole
    if isinstance(rule, Chunk):
        inner = range(part.begin - part.begin % rule.size + rule.size, part.end, rule.size)
        # Many tiny chunks are cheaper in one product with a mask.
        return [part.begin, *inner, part.end] if rule.size >= SHORTEST else whole
    hides = rule.lower(part.end - 1) > max(0, rule.lower(part.begin))
    return [*range(part.begin, part.end, max(SHORTEST, rule.size // 4)), part.end] if hides else whole


def _stretch(rule: Rule, part: Part, begin: int, end: int) -> Stretch:
    """The queries at positions [begin, end)."""
    first = part.ranges[0][0]
    low = max(first, rule.lower(begin))
    mask: Mask = None if end - begin == 1 else "causal"
    if rule.lower(end - 1) > low:
        mask = array_mask(rule, positions_of([(begin, end)]), positions_of([(low, end)]))
    return Stretch(slice(begin - part.begin, end - part.begin), slice(low - first, end - first), mask)
