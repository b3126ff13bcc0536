"""Cuts a long block of queries into stretches that see about the same keys.

Each stretch attends only to the keys that its queries see, so fewer products are computed and then masked.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from ..cells.visibility import Causal, Chunk, Rule
from ..storage import codec
from ..storage.masks import Mask, array_mask, positions_of
from .part import Part
from .products import STRETCH

SHORTEST = 64
"""The smallest stretch, in queries. Smaller ones cost more than they save."""


class Stretch(NamedTuple):
    """Consecutive queries of a part, the keys that at least one of them sees, and their mask."""

    queries: slice
    keys: slice
    mask: Mask


def cut(rule: Rule, part: Part, whole: Stretch) -> list[Stretch]:
    """Cuts the queries of a part, by rising position, into stretches. Returns [whole] unless that pays."""
    borders = _borders(rule, part)
    return [_stretch(rule, part, a, b) for a, b in pairwise(borders)] if len(borders) > 2 else [whole]


def _borders(rule: Rule, part: Part) -> list[int]:
    """The positions at which stretches begin, and the end of the last one."""
    whole = [part.begin, part.end]
    if rule.sinks or any(before[1] != after[0] for before, after in pairwise(part.ranges)):
        return whole
    if isinstance(rule, Causal):
        return [*range(part.begin, part.end, STRETCH), part.end] if codec.is_cpu() else whole
    if isinstance(rule, Chunk):
        inner = range(part.begin - part.begin % rule.size + rule.size, part.end, rule.size)
        # Many small chunks are faster in one product with a mask.
        return [part.begin, *inner, part.end] if rule.size >= SHORTEST else whole
    hides = rule.lower(part.end - 1) > max(0, rule.lower(part.begin))
    return [*range(part.begin, part.end, max(SHORTEST, rule.size // 4)), part.end] if hides else whole


def _stretch(rule: Rule, part: Part, begin: int, end: int) -> Stretch:
    """The stretch of the queries at positions [begin, end)."""
    first = part.ranges[0][0]
    low = max(first, rule.lower(begin))
    mask: Mask = None if end - begin == 1 else "causal"
    if rule.lower(end - 1) > low:
        mask = array_mask(rule, positions_of([(begin, end)]), positions_of([(low, end)]))
    return Stretch(slice(begin - part.begin, end - part.begin), slice(low - first, end - first), mask)
