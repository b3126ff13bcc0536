"""Where tokens go, and how far segments reach: numbers that decide about copies and unused room."""

from __future__ import annotations

import pytest

from mlx_kvcache.cells.placement import DEAD, SMALL_STEP, STEP, Placement, append, capacity_for, place
from mlx_kvcache.cells.spans import Sequence, Span
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.cells.visibility import Causal, Rule, Window
from mlx_kvcache.errors import CacheFullError, NotSupportedError


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
        (8191, 1000, 0, False, 8192),
        (8193, 1000, 0, False, 8704),
        (32_769, 9999, 0, False, 34_816),
    ],
)
def test_the_capacity_of_a_segment(
    required: int, spare: int, reserve: int, is_shared: bool, capacity: int
) -> None:
    assert capacity_for(required, spare, reserve, is_shared) == capacity
    assert capacity_for(5, 0) == 5, "without a reserve, and alone"
    assert [capacity_for(n, 1000) for n in (64, 65, 256, 257, 300)] == [64, 128, 256, 512, 512]


def placed(table: CellTable, rule: Rule, rewind: int, **sizes: int) -> Placement:
    """Tokens of sequences s0, s1, ... placed and assigned."""
    begin, rows = 0, {}
    for name, n in sizes.items():
        rows[int(name[1:])] = tuple(range(begin, begin + n))
        begin += n
    placement = place(table, rows, rule, rewind)
    table.capacity.update(placement.capacity)
    table.packed.update(placement.packed)
    table.levels.update(placement.levels)
    table.assign(placement.changes)
    table.forget([segment for segment in table.orphans if segment not in placement.in_use()])
    return placement


def test_the_first_tokens() -> None:
    table = CellTable(1000)
    placement = placed(table, Causal(), 0, s0=3, s1=2)
    first, second = placement.placed
    assert first.writes == (Span(1, 0, 0, 3),) and first.reads == (Span(1, 0, 0, 3),)
    assert second.writes == (Span(2, 0, 0, 2),) and (second.begin, second.end) == (0, 2)
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
    assert placement.placed[0].writes == (Span(1, 60, 60, 10),)
    assert placement.capacity == {1: 128} and not placement.moves
    assert placement.undo == {0: Sequence(60, (Span(1, 0, 0, 60),))}


def test_a_branch_begins_a_segment_and_grows_in_small_steps() -> None:
    table = CellTable(2000)
    placed(table, Causal(), 0, s0=300)
    assert table.capacity == {1: 512}
    table.assign({1: table[0]})
    # The first that goes on takes the cells behind; the other begins a segment.
    placement = placed(table, Causal(), 0, s0=1, s1=1)
    assert [own.writes for own in placement.placed] == [(Span(1, 300, 300, 1),), (Span(2, 0, 300, 1),)]
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
    assert not placement.moves and placement.placed[0].writes == (Span(3, 0, 70, 1),)
    table.assign({1: None})
    placement = placed(table, Causal(), 0, s2=63)
    assert table.capacity[3] == 64 and placement.placed[0].writes == (Span(3, 1, 71, 63),)
    placement = placed(table, Causal(), 0, s2=1)
    [move] = placement.moves
    assert move.pieces == (Span(2, 0, 10, 60), Span(3, 0, 70, 64))
    assert placement.placed[0].writes == (Span(move.segment, 124, 134, 1),)
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


@pytest.mark.parametrize(("n", "capacity"), [(64, 64), (65, 128), (256, 256), (257, 512)])
def test_a_segment_that_begins_has_no_reserve(n: int, capacity: int) -> None:
    table = CellTable(10_000)
    placed(table, Causal(), 0, s0=n)
    assert table.capacity == {1: capacity}


def test_one_goes_on_in_its_place_beside_others() -> None:
    table = CellTable(1000)
    placed(table, Causal(), 0, s1=3)
    begins, goes_on = placed(table, Causal(), 0, s0=2, s1=1).placed
    assert (begins.writes, goes_on.writes) == ((Span(2, 0, 0, 2),), (Span(1, 3, 3, 1),))
    other, goes_on = placed(table, Causal(), 0, s1=2, s0=1).placed
    assert (other.writes, goes_on.writes) == ((Span(1, 4, 4, 2),), (Span(2, 2, 2, 1),))


def test_a_segment_of_its_own_grows_in_large_steps() -> None:
    table = CellTable(2000)
    placed(table, Causal(), 0, s0=300)
    assert placed(table, Causal(), 0, s0=213).capacity == {1: 768}


def test_a_shared_segment_grows_whatever_else_there_is() -> None:
    table = _full(BEFORE, LAST, shared=(LAST._replace(position=0),))
    placement = place(table, {0: (0,)}, Causal(), 0)
    assert (placement.moves, placement.capacity) == ([], {2: 64})


def test_where_the_end_is_not_held_a_segment_begins() -> None:
    """A window of one token needs nothing of what was before."""
    table = CellTable(100)
    table.capacity[table.new_segment()] = 10
    table.assign({0: Sequence(6, (Span(1, 0, 0, 5),))})
    [own] = place(table, {0: (0,)}, Window(1), 1).placed
    assert own.writes == (Span(2, 0, 6, 1),)


def _full(*spans: Span, room: int = 1000, shared: tuple[Span, ...] = ()) -> CellTable:
    """A sequence whose last segment is full, and another that has some of its spans."""
    table = CellTable(room)
    table.capacity.update({table.new_segment(): 40 for _ in {span.segment for span in spans}})
    table.capacity[spans[-1].segment] = spans[-1].stop
    table.assign({0: Sequence(spans[-1].end, spans)})
    if shared:
        table.assign({1: Sequence(shared[-1].end, shared)})
    return table


BEFORE, LAST = Span(1, 0, 0, 3), Span(2, 0, 3, 61)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("is_shared", "moves"), [(False, True), (True, False)])
def test_a_run_before_the_last_one_is_taken_along_where_it_is_its_own(
    is_shared: bool, moves: bool, swapped: bool
) -> None:
    """In a segment of a lower number or of a higher one."""
    before, last = (BEFORE._replace(segment=2), LAST._replace(segment=1)) if swapped else (BEFORE, LAST)
    table = _full(before, last, shared=(before,) if is_shared else ())
    placement = place(table, {0: (0,)}, Causal(), 0)
    assert [move.pieces for move in placement.moves] == ([(before, last)] if moves else [])
    assert placement.capacity == ({3: 128} if moves else {last.segment: 64})


@pytest.mark.parametrize("swapped", [False, True])
def test_dead_cells_are_those_of_the_last_segment(swapped: bool) -> None:
    """What is held in others does not count."""
    before, last = Span(1 + swapped, 0, 0, 30), Span(2 - swapped, DEAD, 30, 20)
    table = _full(before, last, shared=(before,))
    [move] = place(table, {0: (0,)}, Causal(), 0).moves
    assert move.pieces == (last,)


def test_cells_of_an_eviction_live_until_it_cannot_be_undone() -> None:
    last = Span(1, DEAD, DEAD, 30)
    table = _full(last)
    placement = place(table, {0: (0,)}, Window(20), 10)
    assert placement.undo == {0: Sequence(DEAD + 30, (last,))}
    assert placement.in_use() == {1, 2}


@pytest.mark.parametrize(("dead", "free", "grows"), [(0, 0, True), (1, 0, False), (1, 1, True)])
def test_no_dead_cell_is_left_where_room_is_tight(dead: int, free: int, grows: bool) -> None:
    """All but `free` cells are allocated, some to one that does not use them."""
    table = _full(Span(1, dead, dead, 30), room=40 + dead + free)
    table.capacity[table.new_segment()] = 10
    table.assign({1: Sequence(1, (Span(2, 0, 0, 1),))})
    placement = place(table, {0: (0,)}, Window(31), 1)
    assert placement.capacity == ({1: 31 + dead} if grows else {3: 31})
    assert bool(placement.moves) != grows


def test_a_move_is_undone_in_the_new_place() -> None:
    """Unless something is evicted or changes its bits, which only the old cells have."""
    placement = place(_full(BEFORE, LAST), {0: (0,)}, Causal(), 0)
    assert placement.undo == {0: Sequence(64, (Span(3, 0, 0, 64),))}
    table = _full(BEFORE, LAST)
    table.pack_after = 64
    placement = place(table, {0: (0,)}, Causal(), 0)
    assert (placement.undo, placement.packed) == ({0: table[0]}, {3})


def test_what_cannot_go_on() -> None:
    table = CellTable(100)
    placed(table, Window(4), 1, s0=10)
    table.assign({0: Sequence(9, (Span(1, 8, 8, 1),))})
    with pytest.raises(NotSupportedError, match=r"sequence 0 cannot continue at position 9: .*from 6 on"):
        place(table, {0: (0,)}, Window(4), 1)
    table.assign({0: Sequence(2, (Span(1, 0, 1, 1),))})
    with pytest.raises(NotSupportedError, match="from 0 on"):
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
    with pytest.raises(NotSupportedError, match="sequence 0 cannot continue at position 9"):
        place(table, {0: (0,)}, Window(4, 2), 1)
    assert append(table, {0: (0,)}, Window(4, 2), 9) is None
    assert append(table, {0: (0,)}, Window(4), 1) is not None
