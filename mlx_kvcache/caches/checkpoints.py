"""Which states of a recurrence stay as checkpoints: arithmetic on their positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

Range = tuple[int, int]
"""Positions [begin, end)."""


def anchors(positions: Iterable[int], ranges: Iterable[Range], back: int, interval: int) -> set[int]:
    """Return the checkpoints that are needed to compute the states from `back` on again.

    The newest one at or before `back` is kept, and so is the first one of each range after it. In each range,
    more are kept so that their distance stays about `interval`: when the sequence has grown, one of these is
    the newest before `back`, and the inputs before it can be dropped.

    Args:
        positions: the positions of all checkpoints, by rising position; 0 counts as one.
        ranges: the tokens whose inputs are known.
        back: the first position to which it must be possible to go back.
        interval: the most tokens between two checkpoints, if there are enough.
    """
    kept = {max((p for p in positions if p <= back), default=0)}
    for begin, end in ranges:
        inside = [p for p in positions if begin <= p <= end]
        older = len([p for p in inside if p <= back])
        chain = inside[max(0, older - 1) :]
        last = None
        for position, following in zip(chain, [*chain[1:], end + 1], strict=False):
            if last is None or following - last > interval:
                kept.add(position)
                last = position
    return kept


def expendable(
    positions: Collection[int], end: int, needed: Collection[int], marks: Collection[int]
) -> Iterator[int]:
    """Yield the checkpoints of a sequence in the order in which they should be dropped.

    Unmarked ones come first. Among them, those that lie closest together in proportion to their age.

    Args:
        positions: the checkpoints.
        end: the length of the sequence.
        needed: the checkpoints that must not be dropped.
        marks: the positions that the user has marked.
    """
    left = sorted(positions)
    while candidates := [p for p in left if p not in needed]:
        unmarked = [p for p in candidates if p not in marks]
        dropped = _most_crowded(left, unmarked or candidates, end)
        left.remove(dropped)
        yield dropped


class Expendable(NamedTuple):
    """The checkpoints of a sequence that may be dropped.

    Attributes:
        sequence: the sequence.
        order: their positions, in the order in which they should be dropped.
        sizes: for each of them, the bytes of its arrays by their ids.
    """

    sequence: int
    order: Iterator[int]
    sizes: Mapping[int, Mapping[int, int]]


def beyond(budget: int, streams: Sequence[Expendable], uncounted: Set[int]) -> Iterator[tuple[int, int]]:
    """Yield the checkpoints to drop, as (sequence, position), until the others are within a budget of bytes.

    Sequences lose theirs one after the other. An array counts once, until nothing holds it.

    Args:
        budget: the most bytes.
        streams: the sequences, in the order in which they should lose checkpoints.
        uncounted: the ids of arrays that stay anyway.
    """
    held = [arrays for stream in streams for arrays in stream.sizes.values()]
    holders = Counter(array for arrays in held for array in arrays)
    counted = {array: size for arrays in held for array, size in arrays.items() if array not in uncounted}
    excess = sum(counted.values()) - budget
    for sequence, order, sizes in streams:
        while excess > 0 and (position := next(order, None)) is not None:
            yield sequence, position
            holders.subtract(sizes[position].keys())
            excess -= sum(counted.get(array, 0) for array in sizes[position] if not holders[array])


def _most_crowded(positions: list[int], candidates: list[int], end: int) -> int:
    """Return the candidate whose neighbors lie closest together in proportion to its age."""

    def spread(position: int) -> float:
        index = positions.index(position)
        before = positions[index - 1] if index else 0
        after = positions[index + 1] if index + 1 < len(positions) else end + 1
        return (after - before) / (end + 1 - position)

    return min(candidates, key=spread)
