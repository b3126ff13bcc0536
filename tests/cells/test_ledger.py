"""Random forwards and edits, with the contents of every cell kept beside."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvcache.cells.edits import rebase_all
from mlx_kvcache.cells.placement import DEAD, STEP
from mlx_kvcache.cells.spans import FOREVER
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window

from .ledger import Ledger, random_steps

RULES: list[tuple[Rule, int]] = [
    (Causal(), 0),
    (Window(1), 0),
    (Window(4), 2),
    (Window(5, 2), 3),
    (Window(8, 1), 0),
    (Chunk(1), 1),
    (Chunk(6), 3),
]


@pytest.mark.parametrize("pack_after", [FOREVER, 0, 7], ids=["float", "packed", "packed later"])
@pytest.mark.parametrize(("rule", "rewind"), RULES, ids=str)
def test_every_token_is_found_where_it_should_be(rule: Rule, rewind: int, pack_after: int) -> None:
    """With room for all, with little, and with hardly any."""
    for room in (1000, 40, 16):
        random_steps(Ledger(rule, rewind, room, pack_after), Random(f"{rule} {room}"), 60)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(RULES),
    st.integers(4, 60),
    st.sampled_from([FOREVER, 5]),
    st.integers(0, 2**32),
    st.integers(2, 5),
)
def test_short_stories(rule: tuple[Rule, int], room: int, pack_after: int, seed: int, sequences: int) -> None:
    random_steps(Ledger(*rule, room, pack_after), Random(seed), 12, sequences)


@pytest.mark.parametrize(("rule", "rewind"), [(Causal(), 0), (Window(30, 2), 8), (Chunk(40), 8)], ids=str)
def test_long_sequences_grow_by_steps(rule: Rule, rewind: int) -> None:
    """Single tokens and blocks far beyond a segment's first capacity."""
    ledger, random = Ledger(rule, rewind, 10_000), Random(1)
    while ledger.end(0) < 2 * STEP + DEAD:
        assert not ledger.forward({0: random.choice((1, 1, 1, 20))})
        assert ledger.table.allocated <= 2 * max(STEP, ledger.table.live)
    ledger.check()


def test_room_is_for_what_is_held_and_seen() -> None:
    """As many tokens as there is room for, and not one more."""
    ledger = Ledger(Causal(), 0, 10)
    assert not ledger.forward({0: 6})
    assert ledger.forward({0: 5}) == "CacheFullError"
    assert ledger.forward({0: 2, 1: 3}) == "CacheFullError"
    assert not ledger.forward({0: 2, 1: 2})
    assert ledger.table.live == 10
    ledger.copy(0, 2, 8)
    ledger.check()
    assert ledger.table.live == 10
    assert ledger.forward({2: 1}) == "CacheFullError"


def test_a_window_needs_no_room_for_what_only_its_batch_sees() -> None:
    """Three tokens are held, and three that are seen while others come."""
    for room, refused in ((6, ""), (5, "CacheFullError")):
        ledger = Ledger(Window(4), 0, room)
        for n in (20, 1, 2):
            assert not ledger.forward({0: n})
            ledger.check()
        assert ledger.forward({0: 20}) == refused
        assert ledger.table.live == 3


def test_going_back_further_than_is_held() -> None:
    ledger = Ledger(Window(4), 2, 100)
    ledger.forward({0: 20})
    ledger.truncate(0, 18)
    assert not ledger.forward({0: 1}, is_undone=True)
    ledger.truncate(0, 17)
    assert ledger.forward({0: 1}) == "NotSupportedError"
    assert not ledger.forward({1: 1})


def test_rebasing_all_that_is_held() -> None:
    """In place where nobody shares it, else in a copy, for which there must be room."""
    for is_shared, room, refused in ((False, 12, ""), (True, 24, ""), (True, 23, "full")):
        ledger = Ledger(Causal(), 0, room)
        ledger.forward({0: 12})
        if is_shared:
            ledger.copy(0, 1, 12)
        before = ledger.table[0].spans
        if refused:
            with pytest.raises(Exception, match="12 cells needed, 11 free of a capacity of 23: shared"):
                rebase_all(ledger.table, 0, -3)
            continue
        removal = rebase_all(ledger.table, 0, -3)
        [move] = removal.moves
        assert (move.pieces, move.offset) == (before, -3)
        assert (move.segment not in ledger.table.capacity) == is_shared
        ledger.edit(removal)
        assert [token.position for token in ledger.tokens(ledger.table[0].spans)] == list(range(-3, 9))
        assert ledger.table[0].end == 12
        assert ledger.table[0].spans[0].position == 0
        assert ledger.table.live == (24 if is_shared else 12)
