"""Where tokens go that are moved, and what cannot be taken out."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from mlx_kvcache.cells.edits import drop_tail, remove_range
from mlx_kvcache.cells.placement import Placement
from mlx_kvcache.cells.spans import Sequence, Span, Spans
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.cells.visibility import Causal, Chunk, Window
from mlx_kvcache.errors import CacheFullError, NotSupportedError


class Target(NamedTuple):
    """Where moved tokens go."""

    segment: int
    cell: int
    capacity: int
    is_packed: bool
    is_new: bool


class Rebased(NamedTuple):
    """Which cells are moved, with their new positions, and how far their keys are."""

    source: Spans
    offset: int
    target: Target


def rebased(table: CellTable, removal: Placement) -> Rebased:
    """The only move of a removal."""
    [(segment, pieces, cell, offset)] = removal.moves
    capacity, packed = table.capacity | removal.capacity, table.packed | removal.packed
    assert removal.capacity.keys() == {segment} and removal.packed <= {segment}
    is_new = segment not in table.capacity
    return Rebased(pieces, offset, Target(segment, cell, capacity[segment], segment in packed, is_new))


def table_of(n: int = 10, room: int = 100, capacity: int = 20, start: int = 0, sharers: int = 0) -> CellTable:
    """A sequence of n tokens in one segment, shared by some others."""
    table = CellTable(room)
    table.capacity[table.new_segment()] = capacity
    own = Sequence(n, (Span(1, start, 0, n),))
    table.assign(dict.fromkeys(range(sharers + 1), own))
    return table


def of_runs(*runs: Span, room: int = 100) -> CellTable:
    """A sequence of ten tokens in these runs, in segments of 20 cells."""
    table = CellTable(room)
    table.capacity.update({table.new_segment(): 20 for _ in {run.segment for run in runs}})
    table.assign({0: Sequence(10, runs)})
    return table


def test_the_tail() -> None:
    table = table_of()
    assert drop_tail(table, 0, 4) == Placement(changes={0: Sequence(4, (Span(1, 0, 0, 4),))})
    assert drop_tail(table, 0, 0) == Placement(changes={0: None})
    assert drop_tail(table, 7, 0) == Placement(changes={7: None})


def test_later_tokens_move_to_the_gap() -> None:
    table = table_of()
    removal = remove_range(table, 0, 3, 5, Causal())
    assert removal.changes == {0: Sequence(8, (Span(1, 0, 0, 8),))}
    assert rebased(table, removal) == Rebased((Span(1, 5, 3, 5),), -2, Target(1, 3, 20, False, False))


def test_nothing_moves_where_nothing_follows_or_nothing_goes() -> None:
    table = table_of()
    assert remove_range(table, 0, 7, 10, Causal()) == drop_tail(table, 0, 7)
    assert not remove_range(table, 0, 4, 4, Causal()).moves
    assert remove_range(table, 0, 0, 10, Causal()) == Placement(changes={0: None})
    assert not remove_range(table, 0, 0, 4, Causal(), rebase_head=True).moves


def test_earlier_tokens_move_up_to_the_gap() -> None:
    table = table_of()
    removal = remove_range(table, 0, 3, 5, Causal(), rebase_head=True)
    assert removal.changes == {0: Sequence(8, (Span(1, 2, 0, 8),))}
    assert rebased(table, removal) == Rebased((Span(1, 0, 0, 3),), 2, Target(1, 2, 20, False, False))


def test_what_follows_a_removed_beginning_stays_in_its_first_cells() -> None:
    table = table_of(start=4)
    removal = remove_range(table, 0, 0, 3, Causal())
    assert rebased(table, removal) == Rebased((Span(1, 7, 0, 7),), -3, Target(1, 7, 20, False, False))
    assert removal.changes == {0: Sequence(7, (Span(1, 7, 0, 7),))}


def test_shared_cells_are_copied() -> None:
    """To a segment of its own, which has slack where there is room."""
    table = table_of(sharers=1)
    removal = remove_range(table, 0, 3, 5, Causal())
    assert rebased(table, removal) == Rebased((Span(1, 5, 3, 5),), -2, Target(2, 0, 42, False, True))
    assert removal.changes == {0: Sequence(8, (Span(1, 0, 0, 3), Span(2, 0, 3, 5)))}
    assert table.capacity == {1: 20}, "nothing has changed"


def test_room_for_copies_of_shared_cells() -> None:
    assert remove_range(table_of(room=15, capacity=15, sharers=1), 0, 3, 5, Causal()).moves
    with pytest.raises(CacheFullError, match="shared cells must be copied") as caught:
        remove_range(table_of(room=14, capacity=14, sharers=1), 0, 3, 5, Causal())
    assert (caught.value.needed, caught.value.free, caught.value.capacity) == (5, 4, 14)


@pytest.mark.parametrize(
    ("taken", "is_new"), [(None, False), (9, False), (8, False), (7, True), (3, True), (2, False)]
)
def test_cells_behind_are_used_up_to_the_next_that_is_taken(taken: int | None, is_new: bool) -> None:
    """Five tokens go behind three, into the cells 3 to 7."""
    table = of_runs(Span(1, 0, 0, 3), Span(2, 0, 5, 5))
    if taken is not None:
        table.assign({1: Sequence(1, (Span(1, taken, 0, 1),))})
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.is_new == is_new
    assert target[:2] == ((3, 0) if is_new else (1, 3))


@pytest.mark.parametrize(("capacity", "is_new"), [(8, False), (7, True)])
def test_cells_behind_must_be_there(capacity: int, is_new: bool) -> None:
    table = of_runs(Span(1, 0, 0, 3), Span(2, 0, 5, 5))
    table.capacity[1] = capacity
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.is_new == is_new


@pytest.mark.parametrize(("start", "is_new"), [(3, False), (2, True)])
def test_cells_before_must_be_there(start: int, is_new: bool) -> None:
    """Three tokens go before five that begin at a cell."""
    table = of_runs(Span(1, 0, 0, 3), Span(2, start, 5, 5))
    target = rebased(table, remove_range(table, 0, 3, 5, Causal(), rebase_head=True)).target
    assert target.is_new == is_new
    assert target[:2] == ((3, 0) if is_new else (2, 0))


@pytest.mark.parametrize("other", [1, 3])
def test_moved_tokens_go_behind_the_last_of_several_runs(other: int) -> None:
    """Cells of other segments are not in the way."""
    table = of_runs(Span(other, 1, 0, 2), Span(2, 0, 2, 1), Span(4 - other, 0, 5, 5))
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target == Target(2, 1, 20, False, False)


def test_earlier_tokens_go_before_the_first_of_several_runs() -> None:
    table = of_runs(Span(3, 0, 0, 3), Span(1, 5, 5, 3), Span(2, 9, 8, 2))
    removal = remove_range(table, 0, 3, 5, Causal(), rebase_head=True)
    assert rebased(table, removal) == Rebased((Span(3, 0, 0, 3),), 2, Target(1, 2, 20, False, False))
    assert removal.changes == {0: Sequence(8, (Span(1, 2, 0, 6), Span(2, 9, 6, 2)))}


def test_what_follows_a_removed_beginning_in_several_runs_becomes_one() -> None:
    table = of_runs(Span(1, 4, 0, 6), Span(2, 9, 6, 4))
    removal = remove_range(table, 0, 0, 2, Causal())
    assert rebased(table, removal).target == Target(1, 6, 20, False, False)
    assert removal.changes == {0: Sequence(8, (Span(1, 6, 0, 8),))}


def test_what_others_hold_further_down_is_not_in_the_way() -> None:
    table = of_runs(Span(1, 4, 0, 3), Span(2, 0, 5, 5))
    table.assign({1: Sequence(1, (Span(1, 1, 0, 1),))})
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target == Target(1, 7, 20, False, False)


def test_a_copy_has_no_slack_where_there_is_no_room() -> None:
    table = of_runs(Span(1, 0, 0, 3), Span(2, 0, 5, 5), room=27)
    table.capacity[1] = 7
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target == Target(3, 0, 5, False, True)


@pytest.mark.parametrize(("cell", "is_new"), [(3, True), (5, True), (6, False)])
def test_moved_tokens_do_not_go_where_earlier_ones_stay(cell: int, is_new: bool) -> None:
    """Five of them, behind a token in the first cell, whose predecessors lie further on."""
    table = of_runs(Span(1, cell, 0, 2), Span(1, 0, 2, 1), Span(2, 0, 5, 5))
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.is_new == is_new


def test_a_copy_of_packed_cells_is_packed() -> None:
    table = table_of(sharers=1)
    table.packed.add(1)
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.is_packed and target.is_new
    table.assign({1: None})
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.is_packed and not target.is_new


def test_slack_of_a_copy_is_shared_by_all_sequences() -> None:
    table = table_of(room=49, sharers=3)
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.capacity == 5 + (49 - 20 - 5) // 4
    table.room = 24
    table.capacity[1] = 24
    target = rebased(table, remove_range(table, 0, 3, 5, Causal())).target
    assert target.capacity == 5


@pytest.mark.parametrize(
    ("rule", "spans", "refused"),
    [
        (Window(4), (Span(1, 0, 6, 4),), "next token at 8 would see positions from 5 on, and not all"),
        (Window(4), (Span(1, 0, 3, 7),), ""),
        (Window(4, 2), (Span(1, 0, 3, 7),), "from 5 on"),
        (Chunk(8), (Span(1, 0, 8, 2),), ""),
        (Chunk(5), (Span(1, 0, 5, 5),), ""),
        (Chunk(5), (Span(1, 0, 9, 1),), "from 5 on"),
    ],
)
def test_what_the_next_token_sees_must_be_held(
    rule: Window | Chunk, spans: tuple[Span, ...], refused: str
) -> None:
    """Two of ten tokens go that lie before what is held, or in it."""
    table = CellTable(100)
    table.capacity[table.new_segment()] = 20
    table.assign({0: Sequence(10, spans)})
    if refused:
        with pytest.raises(NotSupportedError, match=rf"cannot remove \[6, 8\) .* of length 10: .*{refused}"):
            remove_range(table, 0, 6, 8, rule)
    else:
        assert remove_range(table, 0, 6, 8, rule).changes[0] is not None


def test_what_is_missing_is_told_from_the_first_position_on() -> None:
    table = CellTable(100)
    table.capacity[table.new_segment()] = 20
    table.assign({0: Sequence(4, (Span(1, 0, 2, 2),))})
    with pytest.raises(NotSupportedError, match="next token at 2 would see positions from 0 on"):
        remove_range(table, 0, 2, 4, Window(4))
