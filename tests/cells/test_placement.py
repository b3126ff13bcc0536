"""Where tokens go, and how far segments reach: numbers that decide about copies and unused room."""

from __future__ import annotations

import pytest

from mlx_kvcache.cells.compaction import compact
from mlx_kvcache.cells.placement import (
    DEAD,
    SMALL_STEP,
    STEP,
    Move,
    Placement,
    Write,
    append,
    capacity_for,
    place,
)
from mlx_kvcache.cells.rules import Causal, Rule, Window
from mlx_kvcache.cells.spans import Sequence, Span
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.errors import CacheFullError, NotSupportedError

from .ledger import Ledger


def test_the_steps() -> None:
    assert (STEP, SMALL_STEP, DEAD) == (256, 64, 128)


@pytest.mark.parametrize(
    ("required", "spare", "reserve", "is_shared", "capacity"),
    [
        (1, 1000, 0, False, 64),
        (64, 1000, 0, False, 64),
        (65, 1000, 0, False, 128),
        (256, 1000, 0, False, 256),
        (257, 1000, 0, False, 512),
        (257, 1000, 0, True, 320),
        (512, 1000, 0, True, 512),
        (65, 10, 0, False, 75),
        (65, 0, 0, False, 65),
        (10, 1000, 128, False, 192),
        (10, 50, 128, False, 60),
        (200, 1000, 128, False, 512),
        (128, 1000, 128, False, 256),
    ],
)
def test_the_capacity_of_a_segment(
    required: int, spare: int, reserve: int, is_shared: bool, capacity: int
) -> None:
    assert capacity_for(required, spare, reserve, is_shared) == capacity
    assert capacity_for(5, 0) == 5, "without a reserve, and alone"
    assert capacity_for(300, 1000) == 512


def placed(table: CellTable, rule: Rule, rewind: int, **sizes: int) -> Placement:
    """Tokens of sequences s0, s1, ... placed and assigned."""
    begin, rows = 0, {}
    for name, n in sizes.items():
        rows[int(name[1:])] = tuple(range(begin, begin + n))
        begin += n
    placement = place(table, rows, rule, rewind)
    table.capacity.update(placement.capacity)
    table.packed.update(placement.packed)
    table.assign(placement.changes)
    table.forget([segment for segment in table.orphans if segment not in placement.in_use()])
    return placement


def test_the_first_tokens() -> None:
    table = CellTable(1000)
    placement = placed(table, Causal(), 0, s0=3, s1=2)
    first, second = placement.placed
    assert first.writes == (Write(0, 3, 1, 0),) and first.reads == (Span(1, 0, 0, 3),)
    assert second.writes == (Write(0, 2, 2, 0),) and (second.begin, second.end) == (0, 2)
    assert placement.undo == {0: None, 1: None} and not placement.moves and not first.fresh
    assert table.capacity == {1: 64, 2: 64}
    assert placement.in_use() == {1, 2}


def test_slack_is_borrowed_from_free_room_and_shared_by_all() -> None:
    """Those that begin in the same batch, too."""
    table = CellTable(40)
    placed(table, Causal(), 0, s0=4, s1=4, s2=2)
    assert table.capacity == {1: 14, 2: 14, 3: 12}
    assert table.allocated == 40
    table = CellTable(40)
    placed(table, Causal(), 0, s0=10)
    assert table.capacity == {1: 40}


def test_growing_behind_the_last_token() -> None:
    table = CellTable(1000)
    placed(table, Causal(), 0, s0=60)
    placement = placed(table, Causal(), 0, s0=10)
    assert placement.placed[0].writes == (Write(0, 10, 1, 60),)
    assert placement.capacity == {1: 128} and not placement.moves
    assert placement.undo == {0: Sequence(60, (Span(1, 0, 0, 60),))}


def test_a_branch_begins_a_segment_and_grows_in_small_steps() -> None:
    table = CellTable(2000)
    placed(table, Causal(), 0, s0=300)
    assert table.capacity == {1: 512}
    table.assign({1: table[0]})
    # The first that goes on takes the cells behind; the other begins a segment.
    placement = placed(table, Causal(), 0, s0=1, s1=1)
    assert [own.writes for own in placement.placed] == [(Write(0, 1, 1, 300),), (Write(0, 1, 2, 0),)]
    assert placement.placed[1].reads == (Span(1, 0, 0, 300), Span(2, 0, 300, 1))
    assert table.capacity == {1: 512, 2: 64}
    placement = placed(table, Causal(), 0, s0=212)
    assert placement.capacity == {1: 576}, "a shared segment grows by 64"


def test_own_runs_become_one_where_they_are_copied_anyway() -> None:
    """A shared beginning, a run of its own, and no room behind that."""
    table = CellTable(2000)
    placed(table, Causal(), 0, s0=10)
    table.assign({1: table[0]})
    placed(table, Causal(), 0, s0=1, s1=60)
    table.assign({2: table[1]})
    placed(table, Causal(), 0, s1=4)
    placement = placed(table, Causal(), 0, s2=1)
    assert not placement.moves and placement.placed[0].writes == (Write(0, 1, 3, 0),)
    table.assign({1: None})
    placement = placed(table, Causal(), 0, s2=63)
    assert table.capacity[3] == 64 and placement.placed[0].writes == (Write(0, 63, 3, 1),)
    placement = placed(table, Causal(), 0, s2=1)
    [move] = placement.moves
    assert move.pieces == (Span(2, 0, 10, 60), Span(3, 0, 70, 64))
    assert placement.placed[0].writes == (Write(0, 1, move.segment, 124),)
    assert table[2].spans == (Span(1, 0, 0, 10), Span(move.segment, 0, 10, 125))


def test_a_window_moves_when_its_segment_is_full_of_dead_cells() -> None:
    table = CellTable(10_000)
    rule = Window(20)
    placed(table, rule, 0, s0=19)
    moves = []
    for step in range(600):
        placement = placed(table, rule, 0, s0=1)
        assert table.live == 19
        moves += [(step, len(move.pieces), table.capacity[move.segment]) for move in placement.moves]
        assert table.allocated <= 20 + 2 * DEAD + STEP
    assert moves and all(pieces == 1 and capacity == 192 for _, pieces, capacity in moves)
    assert moves[1][0] - moves[0][0] == 192 - 18


@pytest.mark.parametrize(("dead", "grows"), [(DEAD - 1, True), (DEAD, False)])
def test_how_many_dead_cells_let_a_segment_move(dead: int, grows: bool) -> None:
    table = CellTable(10_000)
    length = 256 - dead
    table.capacity[1] = 256
    table.assign({0: Sequence(256, (Span(1, dead, dead, length),))})
    placement = place(table, {0: (0,)}, Window(length + 1), 1)
    assert bool(placement.moves) != grows
    # Where room is tight none are left to lie.
    table.room = 256
    placement = place(table, {0: (0,)}, Window(length + 1), 1)
    assert placement.moves


def test_what_cannot_go_on() -> None:
    table = CellTable(100)
    placed(table, Window(4), 1, s0=10)
    table.assign({0: Sequence(9, (Span(1, 8, 8, 1),))})
    with pytest.raises(
        NotSupportedError, match=r"sequence 0 cannot go on at position 9: .*from position 6 on"
    ):
        place(table, {0: (0,)}, Window(4), 1)
    table = CellTable(10)
    placed(table, Causal(), 0, s0=6)
    with pytest.raises(CacheFullError) as caught:
        place(table, {0: (0, 1, 2), 1: (3, 4)}, Causal(), 0)
    assert (caught.value.needed, caught.value.free, caught.value.capacity) == (5, 4, 10)


def test_sinks_that_are_not_held() -> None:
    """As a file may say: what a window needs is there, in one run, and its first tokens are not."""
    table = CellTable(100)
    table.capacity[1] = 20
    table.assign({0: Sequence(9, (Span(1, 0, 5, 4),))})
    with pytest.raises(NotSupportedError, match="sequence 0 cannot go on at position 9"):
        place(table, {0: (0,)}, Window(4, 2), 1)
    assert append(table, 0, (0,), Window(4, 2), 9) is None
    assert append(table, 0, (0,), Window(4), 1) is not None


def _one(end: int = 6, start: int = 0, position: int = 0, room: int = 100, pack_after: int = 99) -> CellTable:
    table = CellTable(room, pack_after)
    table.capacity[1] = 10
    table.assign({0: Sequence(end, (Span(1, start, position, end - position),))})
    return table


def test_the_way_that_decoding_takes() -> None:
    table = _one()
    placement = append(table, 0, (0, 1, 2, 3), Causal(), 0)
    assert placement is not None and placement == place(table, {0: (0, 1, 2, 3)}, Causal(), 0)
    [own] = placement.placed
    assert (own.begin, own.end, own.writes, own.fresh) == (6, 10, (Write(0, 4, 1, 6),), False)
    assert own.reads == (Span(1, 0, 0, 10),) and placement.changes == {0: Sequence(10, own.reads)}
    assert placement.undo == {0: table[0]}
    windowed = append(table, 0, (0,), Window(3), 1)
    assert windowed is not None
    assert windowed.placed[0].reads == (Span(1, 4, 4, 3),)
    assert windowed.changes == {0: Sequence(7, (Span(1, 4, 4, 3),))}


def _shared() -> CellTable:
    table = _one()
    table.assign({1: table[0]})
    return table


def _two() -> CellTable:
    table = _one()
    table.assign({0: Sequence(6, (Span(1, 0, 0, 3), Span(1, 5, 3, 3)))})
    return table


def _short() -> CellTable:
    table = _one()
    table.assign({0: Sequence(6, (Span(1, 0, 0, 5),))})
    return table


@pytest.mark.parametrize(
    ("table", "n", "rule", "rewind"),
    [
        (_two(), 1, Causal(), 0),
        (_short(), 1, Window(1), 0),
        (_shared(), 1, Causal(), 0),
        (_one(), 5, Causal(), 0),
        (_one(room=7), 2, Causal(), 0),
        (_one(pack_after=6), 1, Causal(), 0),
        (_one(position=1), 1, Causal(), 0),
        (_one(position=3), 1, Window(5), 0),
        (_one(), 4, Window(2), 0),
        (_one(), 1, Window(3, 1), 1),
        (CellTable(9), 1, Causal(), 0),
    ],
    ids=[
        "two runs",
        "end not held",
        "shared",
        "full",
        "no room",
        "to be packed",
        "beginning not held",
        "window not held",
        "not all held",
        "sinks apart",
        "nothing",
    ],
)
def test_where_decoding_takes_another_way(table: CellTable, n: int, rule: Rule, rewind: int) -> None:
    assert append(table, 0, tuple(range(n)), rule, rewind) is None


@pytest.mark.parametrize(
    ("table", "n", "rule", "rewind"),
    [
        (_one(), 4, Causal(), 0),
        (_one(room=8), 2, Causal(), 0),
        (_one(pack_after=7), 1, Causal(), 0),
        (_one(position=4), 1, Window(3), 0),
        (_one(), 4, Window(2), 3),
        (_one(end=3), 1, Window(5, 2), 1),
    ],
    ids=["to the last cell", "to the last room", "just in float", "window held", "all held", "sinks near"],
)
def test_where_it_still_takes_this_one(table: CellTable, n: int, rule: Rule, rewind: int) -> None:
    assert append(table, 0, tuple(range(n)), rule, rewind) is not None


def test_compaction_leaves_no_unused_cell() -> None:
    """Shared cells move once, packed ones stay packed, and full segments stay where they are."""
    ledger = Ledger(Causal(), 0, 1000, pack_after=8)
    for sequence, n in ((0, 6), (1, 12)):
        ledger.forward({sequence: n})
    ledger.copy(0, 2, 4)
    ledger.truncate(0, 5)
    ledger.forward({0: 1, 2: 1})
    full = ledger.table[1].spans[0].segment
    ledger.table.capacity[full] = 12
    before = ledger.table.allocated
    plan = compact(ledger.table)
    assert all(move.segment not in ledger.table.capacity for move in plan.moves)
    assert full not in {span.segment for move in plan.moves for span in move.pieces}
    ledger.apply(plan)
    ledger.sweep(plan)
    ledger.check()
    assert ledger.table.allocated == ledger.table.live < before
    assert not compact(ledger.table).changes
    assert ledger.table.packed == {full}


def test_compaction_keeps_packed_segments_packed() -> None:
    ledger = Ledger(Causal(), 0, 1000, pack_after=0)
    ledger.forward({0: 6})
    plan = compact(ledger.table)
    assert plan.packed == {move.segment for move in plan.moves} != set()


def test_compaction_closes_every_gap() -> None:
    """Three runs of one segment, which two sequences hold, in no order of position."""
    table = CellTable(100)
    table.capacity[table.new_segment()] = 30
    table.assign(
        {
            0: Sequence(9, (Span(1, 20, 0, 4), Span(1, 3, 4, 2), Span(1, 10, 6, 3))),
            1: Sequence(3, (Span(1, 11, 1, 2),)),
        }
    )
    plan = compact(table)
    assert plan.moves == [Move(2, (Span(1, 3, 0, 2), Span(1, 10, 0, 3), Span(1, 20, 0, 4)))]
    assert plan.capacity == {2: 9}
    assert plan.changes == {
        0: Sequence(9, (Span(2, 5, 0, 4), Span(2, 0, 4, 2), Span(2, 2, 6, 3))),
        1: Sequence(3, (Span(2, 3, 1, 2),)),
    }
