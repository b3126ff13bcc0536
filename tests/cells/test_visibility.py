"""Who sees whom, against the sentences that say so."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window, visible

CASES: list[tuple[Rule, list[set[int]]]] = [
    (Causal(), [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]),
    (Window(1), [{0}, {1}, {2}, {3}, {4}, {5}]),
    (Window(3), [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}]),
    (Window(2, sinks=1), [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}, {0, 4, 5}]),
    (Chunk(1), [{0}, {1}, {2}, {3}, {4}, {5}]),
    (Chunk(3), [{0}, {0, 1}, {0, 1, 2}, {3}, {3, 4}, {3, 4, 5}]),
]


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=str)
def test_who_sees_whom(rule: Rule, expected: list[set[int]]) -> None:
    assert [{k for k in range(6) if visible(rule, q, k)} for q in range(6)] == expected
    q, k = np.arange(6)[:, None], np.arange(6)[None]
    seen = visible(rule, q, k)
    assert [set(np.flatnonzero(row).tolist()) for row in seen] == expected


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=str)
def test_later_lifts_the_upper_bound_only(rule: Rule, expected: list[set[int]]) -> None:
    for q, seen in enumerate(expected):
        assert {k for k in range(6) if visible(rule, q, k, later=True)} == seen | set(range(q, 6))
    queries, keys = np.arange(6)[:, None], np.arange(6)[None]
    some = visible(rule, queries, keys, queries == 2)
    for index, row in enumerate(some):
        more = set(range(2, 6)) if index == 2 else set()
        assert set(np.flatnonzero(row).tolist()) == expected[index] | more


@pytest.mark.parametrize(
    ("rule", "lowest"),
    [
        (Causal(), [0, 0, 0, 0]),
        (Window(3), [-2, -1, 0, 1]),
        (Window(1, 0), [0, 1, 2, 3]),
        (Chunk(2), [0, 0, 2, 2]),
    ],
    ids=str,
)
def test_the_lower_bound(rule: Rule, lowest: list[int]) -> None:
    assert [rule.lower(q) for q in range(4)] == lowest


def test_rules_are_values() -> None:
    """Pools of one model are told apart by them."""
    assert {Window(3), Window(3, 0), Window(3, 1), Chunk(3), Causal(), Causal()} == {
        Causal(),
        Chunk(3),
        Window(3, 1),
        Window(3),
    }
    for rule, name in ((Causal(), "sinks"), (Window(3), "size"), (Chunk(3), "size")):
        with pytest.raises(AttributeError):
            setattr(rule, name, 4)
    assert (Causal().sinks, Chunk(3).sinks, Window(3).sinks, Window(3, 2).sinks) == (0, 0, 0, 2)
