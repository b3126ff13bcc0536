"""The table against a dict of sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest

from mlx_kvcache.cells.spans import EMPTY, FOREVER, Sequence, Span, Spans
from mlx_kvcache.cells.table import CellTable

CAPACITY = 12


def places(spans: Spans) -> set[tuple[int, int]]:
    return {(span.segment, span.start + i) for span in spans for i in range(span.length)}


def random_sequence(random: Random, segments: list[int]) -> Sequence | None:
    if random.random() < 0.2:
        return None
    spans, position = [], 0
    for segment in random.sample(segments, random.randint(0, min(3, len(segments)))):
        start = random.randrange(CAPACITY - 1)
        length = random.randint(1, CAPACITY - start)
        position += random.randint(0, 2)
        spans.append(Span(segment, start, position, length))
        position += length
    return Sequence(position + random.randint(0, 2), tuple(spans))


def assert_right(table: CellTable, truth: dict[int, Sequence]) -> None:
    """All that the table tells follows from its sequences."""
    table.check()
    assert table.sequences == truth
    cells = {place for sequence in truth.values() for place in places(sequence.spans)}
    owned = {segment for segment, _ in cells}
    assert table.live == len(cells)
    assert set(table.owned()) == owned
    assert table.orphans == set(table.capacity) - owned
    assert table.allocated == CAPACITY * len(owned)
    for segment in table.capacity:
        owners = {s for s, own in truth.items() if any(span.segment == segment for span in own.spans)}
        assert table.owners(segment) == owners
        for but in (None, *truth):
            left = {place for s, own in truth.items() if s != but for place in places(own.spans)}
            found = table.cells(segment, but)
            assert {(segment, c) for low, high in found for c in range(low, high)} == {
                place for place in left if place[0] == segment
            }


@pytest.mark.parametrize("seed", range(6))
def test_random_changes(seed: int) -> None:
    random, table = Random(seed), CellTable(1000)
    segments = [table.new_segment() for _ in range(4)]
    assert segments == [1, 2, 3, 4]
    table.capacity.update(dict.fromkeys(segments, CAPACITY))
    table.orphans.update(segments)
    truth: dict[int, Sequence] = {}
    for _ in range(120):
        changes = {
            s: random_sequence(random, segments) for s in random.sample(range(4), random.randint(1, 3))
        }
        after = {s: new for s, new in {**truth, **changes}.items() if new is not None}
        expected = len({place for own in after.values() for place in places(own.spans)})
        assert table.live_after(changes) == expected
        assert_right(table, truth)
        before = {s: truth.get(s) for s in changes}
        table.assign(changes)
        if random.random() < 0.3:
            table.restore(before)
        else:
            truth = after
        assert_right(table, truth)


@pytest.mark.parametrize("by", [1, 5, -2])
def test_a_sequence_gets_longer_alone(by: int) -> None:
    """What decoding does at every step."""
    table = CellTable(1000)
    table.capacity[1] = CAPACITY
    table.assign({0: Sequence(4, (Span(1, 0, 0, 4),))})
    longer = Sequence(4 + by, (Span(1, 0, 0, 4 + by),))
    assert table.live_after({0: longer}) == 4 + by
    table.assign({0: longer})
    assert_right(table, {0: longer})


def test_a_sequence_gets_longer_beside_one_that_shares() -> None:
    table = CellTable(1000)
    table.capacity[1] = CAPACITY
    shared = Sequence(4, (Span(1, 0, 0, 4),))
    table.assign({0: shared, 1: shared})
    longer = Sequence(6, (Span(1, 0, 0, 6),))
    table.assign({0: longer})
    assert_right(table, {0: longer, 1: shared})
    table.assign({1: Sequence(5, (Span(1, 0, 0, 5),))})
    assert table.live == 6
    # Into another segment, from none, and to none.
    table.capacity[2] = CAPACITY
    for new in (Sequence(3, (Span(2, 0, 0, 3),)), EMPTY, shared, None):
        table.assign({0: new})
        table.check()
    assert table.sequences.keys() == {1} and table.live == 5


def test_what_is_unknown() -> None:
    table = CellTable(5)
    assert table[3] == EMPTY
    assert table.owners(9) == frozenset() and not table.cells(9)
    assert table.owned() == () and table.allocated == 0
    table.assign({3: None})
    table.assign({})
    assert not table.sequences
    table.check()


def test_what_is_packed() -> None:
    """A sequence beyond a length, or with anything in a packed segment."""
    table = CellTable(5, pack_after=3)
    table.packed.add(2)
    plain, packed = (Span(1, 0, 0, 2),), (Span(1, 0, 0, 1), Span(2, 0, 1, 1))
    assert [table.packs(plain, length) for length in (0, 3, 4)] == [False, False, True]
    assert table.packs(packed) and not table.packs(plain) and not table.packs(())
    assert not CellTable(5).packs(plain, FOREVER)
    assert not CellTable(5, pack_after=0).packs(plain)


def test_forgotten_segments() -> None:
    table = CellTable(50)
    for segment in (1, 2, 3):
        table.capacity[segment] = CAPACITY
        table.packed.add(segment)
        table.assign({segment: Sequence(2, (Span(segment, 0, 0, 2),))})
    table.assign({1: None, 2: None})
    assert table.orphans == {1, 2}
    table.forget([1])
    assert (table.orphans, set(table.capacity), table.packed) == ({2}, {2, 3}, {2, 3})
    table.check()


def test_an_exception_among_forgotten_segments() -> None:
    """Those that are gone are no orphans any more."""
    table = CellTable(50)
    table.capacity.update({1: CAPACITY, 2: CAPACITY})
    table.orphans.update({1, 2})

    class Failing(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.forget(Failing())
    assert (table.orphans, set(table.capacity)) == ({2}, {2})
    table.check()


def test_restored_capacities() -> None:
    """Also of segments that have gone, and of those that were not there."""
    table = CellTable(50)
    table.capacity.update({1: CAPACITY, 2: CAPACITY})
    table.packed.update({1, 2})
    old = Sequence(2, (Span(1, 0, 0, 2),))
    table.assign({0: old, 1: Sequence(3, (Span(2, 4, 0, 3),))})
    del table.capacity[2]
    table.capacity.update({1: 40, 3: 8})
    table.restore({0: old, 1: None})
    assert (table.capacity, table.packed, table.orphans) == ({1: 40, 3: 8}, {1}, {3})
    assert (table.sequences, table.live) == ({0: old}, 2)
    table.check()


def test_an_exception_in_the_middle_leaves_nothing() -> None:
    table = CellTable(50)
    table.capacity[1] = CAPACITY
    old = Sequence(2, (Span(1, 0, 0, 2),))
    table.assign({0: old, 1: old})
    with pytest.raises(AttributeError):
        table.assign({0: None, 1: "no sequence"})  # type: ignore[dict-item]
    assert table.sequences == {0: old, 1: old}
    table.check()


def _broken(change: Callable[[CellTable], object]) -> CellTable:
    table = CellTable(20)
    table.capacity.update({1: CAPACITY, 2: CAPACITY, 3: CAPACITY})
    table.assign({0: Sequence(6, (Span(1, 0, 0, 3), Span(2, 0, 3, 3))), 1: Sequence(3, (Span(1, 0, 0, 3),))})
    table.orphans.add(3)
    table.check()
    change(table)
    return table


def _with(spans: Spans, end: int = 6) -> Callable[[CellTable], object]:
    return lambda table: table.sequences.update({0: Sequence(end, spans)})


@pytest.mark.parametrize(
    "change",
    [
        _with((Span(1, 0, 0, 3), Span(2, 0, 2, 3))),
        _with((Span(1, 0, 3, 3), Span(2, 0, 0, 3))),
        _with((Span(1, 0, 0, 3), Span(2, 0, 3, 0))),
        _with((Span(1, 0, 0, 3), Span(2, 0, 3, 3), Span(2, 3, 6, 0))),
        _with((Span(1, 0, 0, 3), Span(2, 0, 3, 3), Span(2, 3, 6, -1))),
        _with((Span(1, 0, -1, 3), Span(2, 0, 3, 3))),
        _with((Span(1, -1, 0, 3), Span(2, 0, 3, 3))),
        _with((Span(1, 0, 0, 3), Span(2, -1, 3, 3))),
        _with((Span(1, 0, 0, 3), Span(2, CAPACITY - 2, 3, 3))),
        _with((Span(1, 0, 0, 3), Span(2, 0, 3, 3)), end=5),
        _with((Span(1, 0, 0, 3), Span(2, 0, 3, 2))),
        lambda table: table._owners[1].discard(1),
        lambda table: table._owners.update({3: {0}}),
        lambda table: setattr(table, "live", 5),
        lambda table: setattr(table, "live", 7),
        lambda table: setattr(table, "room", 5),
        lambda table: table._live.update({1: 4}),
        lambda table: table.orphans.add(1),
        lambda table: table.orphans.add(9),
        lambda table: table.orphans.discard(3),
        lambda table: table.capacity.update({4: 1}),
        lambda table: table.packed.add(9),
    ],
)
def test_check_finds_what_is_wrong(change: Callable[[CellTable], object]) -> None:
    with pytest.raises(AssertionError):
        _broken(change).check()
