"""The short way to a place, which decoding takes at nearly every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvcache.cells.placement import append, place
from mlx_kvcache.cells.spans import FOREVER, Sequence, Span
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window


def test_what_may_be_rewound_from_the_first_token_on() -> None:
    appended = append(_one(end=1), {0: (0,)}, Window(1), 2)
    assert appended is not None and appended.changes == {0: Sequence(2, (Span(1, 0, 0, 2),))}


@st.composite
def one_run(draw: st.DrawFn) -> tuple[CellTable, int, Rule, int]:
    """A sequence that is held in one run, tokens to come, a rule and a number of tokens to rewind."""
    size, sinks = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    rules: list[Rule] = [Causal(), Window(size), Window(size, sinks), Chunk(size)]
    rule = draw(st.sampled_from(rules))
    end, rewind = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    # All that may be held, or less.
    lowest = max(0, rule.lower(max(0, end - rewind)))
    position = draw(st.integers(0, min(lowest, end - 1)))
    table = CellTable(draw(st.integers(10, 40)), draw(st.sampled_from([FOREVER, 0, 4, 8])))
    start = draw(st.integers(0, 3))
    table.capacity[table.new_segment()] = draw(st.integers(start + end - position, 20))
    table.packed.update({1} if draw(st.booleans()) else ())
    table.assign({0: Sequence(end, (Span(1, start, position, end - position),))})
    if draw(st.booleans()):
        table.assign({1: table[0]})
    return table, draw(st.integers(1, 5)), rule, rewind


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(one_run())
def test_the_way_that_decoding_takes_leads_to_the_same(given_: tuple[CellTable, int, Rule, int]) -> None:
    table, n, rule, rewind = given_
    rows = {0: tuple(range(n))}
    if append(table, rows, rule, rewind):
        short = place(table, rows, rule, rewind)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("mlx_kvcache.cells.placement.append", lambda *_: None)
            assert place(table, rows, rule, rewind) == short


def _one(end: int = 6, start: int = 0, position: int = 0, room: int = 100, pack_after: int = 99) -> CellTable:
    table = CellTable(room, pack_after)
    table.capacity[1] = 10
    table.assign({0: Sequence(end, (Span(1, start, position, end - position),))})
    return table


def test_the_way_that_decoding_takes() -> None:
    table = _one()
    assert append(table, {0: (0, 1, 2, 3)}, Causal(), 0)
    placement = place(table, {0: (0, 1, 2, 3)}, Causal(), 0)
    [own] = placement.placed
    assert (own.begin, own.end, own.writes, own.fresh) == (6, 10, (Span(1, 6, 6, 4),), False)
    assert own.reads == (Span(1, 0, 0, 10),) and placement.changes == {0: Sequence(10, own.reads)}
    assert placement.undo == {0: table[0]}
    windowed = append(table, {0: (0,)}, Window(3), 1)
    assert windowed is not None
    assert windowed.reads == [(Span(1, 4, 4, 3),)]
    assert windowed.changes == {0: Sequence(7, (Span(1, 4, 4, 3),))}


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
        (_short(), 1, Window(1), 1),
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
        "end not held, and not needed",
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
    assert append(table, {0: tuple(range(n))}, rule, rewind) is None


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
    assert append(table, {0: tuple(range(n))}, rule, rewind) is not None
