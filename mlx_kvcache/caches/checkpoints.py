"""Which states of a recurrence stay as checkpoints: arithmetic on their positions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

Range = tuple[int, int]
"""Positions [begin, end)."""


def anchors(positions: Iterable[int], ranges: Iterable[Range], back: int, interval: int) -> set[int]:
    """Return the checkpoints that are needed to compute the states from `back` on again.

    Each range needs one at or before `back`, or else its first one. After that, more are kept so that their
    distance stays about `interval`: when the sequence has grown, one of these is the new first one, and the
    inputs before it can be dropped.

    Args:
        positions: the positions of all checkpoints, by rising position; 0 counts as one.
        ranges: the tokens whose inputs are known.
        back: the first position to which it must be possible to go back.
        interval: the most tokens between two checkpoints, if there are enough.
    """
    kept: set[int] = set()
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
    positions: Collection[int], end: int, needed: Collection[int], marks: Collection[int] = ()
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


def _most_crowded(positions: list[int], candidates: list[int], end: int) -> int:
    """Return the candidate whose neighbors lie closest together in proportion to its age."""

    def spread(position: int) -> float:
        index = positions.index(position)
        before = positions[index - 1] if index else 0
        after = positions[index + 1] if index + 1 < len(positions) else end + 1
        return (after - before) / (end + 1 - position)

    return min(candidates, key=spread)
