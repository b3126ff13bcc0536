"""Which rows of a decoding batch are stacked, where their cells lie, and what is copied for that."""

from __future__ import annotations

import pytest

from mlx_kvcache.attend.part import Part, stacks_of
from mlx_kvcache.cells.placement import DEAD, Placement, compact, place
from mlx_kvcache.cells.spans import FOREVER, Span, clip, count
from mlx_kvcache.cells.stacks import LONG, SLACK
from mlx_kvcache.cells.table import CellTable, Level
from mlx_kvcache.cells.visibility import Causal, Rule, Window

from .test_placement import placed


def table_of(*lengths: int, room: int = FOREVER, rule: Rule = Causal()) -> CellTable:  # noqa: B008  # immutable
    """A table of sequences 0, 1, ... of these lengths, each in a segment of its own."""
    table = CellTable(room)
    for sequence, length in enumerate(lengths):
        placed(table, rule, 0, **{f"s{sequence}": length})
    return table


def decoded(table: CellTable, *sequences: int, rule: Rule = Causal()) -> Placement:  # noqa: B008  # immutable
    """One more token for each of these."""
    placement = placed(table, rule, 0, **{f"s{sequence}": 1 for sequence in sequences})
    table.check()
    return placement


def test_rows_end_in_one_column_level_by_level() -> None:
    table = table_of(50, 57, 64)
    placement = decoded(table, 0, 1, 2)
    assert table.levels == {name: Level((4, 5, 6), name - 4) for name in (4, 5, 6)}
    assert [move.cell for move in placement.moves] == [14, 7, 0], "padding comes first"
    assert [own.writes for own in placement.placed] == [
        (Span(4, 64, 50, 1),),
        (Span(5, 64, 57, 1),),
        (Span(6, 64, 64, 1),),
    ]
    assert next(own.reads for own in placement.placed) == (Span(4, 14, 0, 51),)
    again = decoded(table, 0, 1, 2)
    assert not again.moves and {own.writes[0].start for own in again.placed} == {65}


def test_a_stack_grows_as_one_and_not_for_one_of_its_rows() -> None:
    table = table_of(64, 64)
    decoded(table, 0, 1)
    capacity = table.capacity[3]
    for _ in range(capacity - 65):
        assert not decoded(table, 0, 1).capacity
    assert decoded(table, 0, 1).capacity == dict.fromkeys((3, 4), capacity + 64)
    alone = placed(table, Causal(), 0, s0=capacity)
    assert alone.capacity.keys() == {5} and 5 not in table.levels, "it leaves the stack"


@pytest.mark.parametrize("others", [SLACK, SLACK + 1])
def test_rows_that_need_much_padding_are_left_out(others: int) -> None:
    table = table_of(2 * SLACK, 2 * SLACK - others, 2 * SLACK - others)
    placement = decoded(table, 0, 1, 2)
    names = (4, 5, 6) if others == SLACK else (4, 5)
    assert set(table.levels) == set(names)
    assert len(placement.moves) == len(names)


def test_a_prefix_that_rows_share_stays_where_it_is() -> None:
    table = table_of(LONG + 40)
    origin = table[0].spans
    table.assign({1: table[0], 2: table[0]._replace(end=LONG + 30, spans=clip(origin, 0, LONG + 30))})
    placement = decoded(table, 0, 1, 2)
    assert [count(move.pieces) for move in placement.moves] == [11, 11, 1], "each row has a cell of its own"
    assert {own.reads[0] for own in placement.placed} == {origin[0]._replace(length=LONG + 29)}
    assert not decoded(table, 0, 1, 2).moves


@pytest.mark.parametrize(
    ("room", "shared", "moves"), [(FOREVER, LONG - 1, 2), (FOREVER, LONG, 0), (9999, 1, 0)]
)
def test_what_others_share_is_not_stored_twice(room: int, shared: int, moves: int) -> None:
    """Short runs are, if the room has no bound. Rows that are one run with it are not stacked."""
    table = table_of(300, 300, room=room)
    for sequence in (0, 1):
        table.assign(
            {sequence + 2: table[sequence]._replace(end=shared, spans=clip(table[sequence].spans, 0, shared))}
        )
    assert len(decoded(table, 0, 1).moves) == moves


def test_rows_on_several_prefixes_are_one_stack() -> None:
    """Also rows that others share with them, or that have grown from a prefix in its own segment."""
    table = table_of(LONG, LONG + 44, 20)
    for sequence, origin in ((3, 0), (4, 1), (5, 0), (6, 1), (7, 0)):
        table.assign({sequence: table[origin]})
        placed(table, Causal(), 0, **{f"s{sequence}": sequence})
    table.assign({8: table[7]})
    before = table.live
    placement = decoded(table, 3, 4, 5, 6, 7)
    assert [count(move.pieces) for move in placement.moves] == [3, 4, 5, 6, 7]
    assert table.live == before + 7 + 5, "of the prefixes nothing is copied"
    [stack] = stacks_of([Part(own, 5, table.levels) for own in placement.placed], table.levels, 5)
    assert stack.prefix == () and stack.others == [(3, table[0].spans), (2, table[1].spans)]
    assert stack.order == (0, 2, 4, 1, 3)
    assert not decoded(table, 3, 4, 5, 6, 7).moves


def test_a_room_without_space_for_padding_is_left_as_it_is() -> None:
    table = table_of(40, 50, room=100)
    assert not decoded(table, 0, 1).moves and not table.levels


def test_rows_that_leave_and_join_are_not_copied_at_once() -> None:
    table = table_of(*[60] * 8)
    decoded(table, 0, 1, 2, 3, 4)
    assert not decoded(table, 0, 1, 3, 4, 5).moves, "two runs of levels, and a row that has joined"
    assert len(decoded(table, 0, 1, 3, 4, 5, 6).moves) == 6, "one write and product too many"
    assert len(decoded(table, 0, 3).moves) == 2, "no levels beside each other"


def test_rows_that_stay_together_become_one_stack() -> None:
    table = table_of(*[60] * 4)
    decoded(table, 0, 1, 2)
    assert not decoded(table, 0, 1, 2, 3).moves
    rows = {sequence: (sequence,) for sequence in range(4)}
    assert len(place(table, rows, Causal(), 0, is_settled=True).moves) == 4
    assert not place(table, {0: (0,), 1: (1,), 2: (2,)}, Causal(), 0, is_settled=True).moves, "it is one"


def test_a_stack_of_which_most_is_free_can_be_given_back() -> None:
    table = table_of(*[60] * 4)
    decoded(table, 0, 1, 2, 3)
    table.assign({0: None, 1: None})
    table.forget([5, 6])
    assert not table.thin()
    table.assign({2: None})
    table.forget([7])
    assert table.thin() == {8}
    plan = compact(table, table.thin())
    assert [(move.segment, count(move.pieces)) for move in plan.moves] == [(9, 61)]
    assert plan.changes == {3: table[3]._replace(spans=(Span(9, 0, 0, 61),))}


def test_a_window_moves_to_a_new_stack_when_much_is_dead() -> None:
    rule = Window(32, 0)
    table = table_of(100, 100, rule=rule)
    moved = [bool(decoded(table, 0, 1, rule=rule).moves) for _ in range(3 * DEAD)]
    assert moved[0] and sum(moved) == 3, "not at every step"
    assert all(count(table[sequence].spans) == 31 for sequence in (0, 1))


def test_of_forks_of_stacked_rows_only_one_takes_the_next_cell() -> None:
    table = table_of(20, 21)
    decoded(table, 0, 1)
    table.assign({2: table[0], 3: table[1]})
    placement = decoded(table, 0, 1, 2, 3)
    writes = {(own.writes[0].segment, own.writes[0].start) for own in placement.placed}
    assert len(writes) == 4
