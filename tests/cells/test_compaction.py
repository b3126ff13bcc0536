"""Giving unused cells back."""

from __future__ import annotations

from mlx_kvcache.cells.placement import Move, compact
from mlx_kvcache.cells.spans import Sequence, Span
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.cells.visibility import Causal

from .ledger import Ledger


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
