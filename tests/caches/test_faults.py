"""An exception inside a change: memory runs out, or somebody interrupts. All is as it was, and goes on.

`test_interrupts.py` does the same at every line; here the changes' own steps fail, after they have been done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CacheConfig, CacheError, CausalCache, SlidingWindowCache, WrapperCache
from mlx_kvcache.attend.step import Step
from mlx_kvcache.caches.base import PlanningCache
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.storage.buffers import Pair, Store
from tests.caches.data import coded, column, fed
from tests.fuzz.samples import feed, samples
from tests.interrupts import Planted
from tests.kinds import KINDS

NAMES = [str(KINDS[0]), str(KINDS[3]), str(KINDS[-1])]


def held(cache: Any) -> list[object]:
    """What is known of every sequence, in every child."""
    found: list[object] = []
    for child in getattr(cache, "_children", [cache]):
        found += [dict(child._table.sequences), child._table.live, child._table.allocated]
    return found


def _restore(cache: PlanningCache) -> None:
    cache._plan_restore(5, cache._snapshot(0)).commit()


CHANGES: dict[str, Callable[[PlanningCache], object]] = {
    "a forward": lambda cache: feed(cache, 3),
    "a beginning": lambda cache: cache.start_forward(Batch.run(7, 0, 2)),
    "a tail": lambda cache: cache.remove(0, 8),
    "a range": lambda cache: cache.remove(1, 2, 4),
    "a copy": lambda cache: cache.copy_prefix(0, 3, 8),
    "a snapshot": _restore,
}
ASSIGN, ADOPT, BEGIN = (CellTable, "assign"), (Store, "adopt"), (Step, "__init__")
STEPS: list[tuple[str, tuple[type, str]]] = [
    *(("a forward", step) for step in (ASSIGN, BEGIN)),
    *(("a beginning", step) for step in (ASSIGN, BEGIN)),
    ("a tail", ASSIGN),
    *(("a range", step) for step in (ASSIGN, ADOPT)),
    ("a copy", ASSIGN),
    *(("a snapshot", step) for step in (ASSIGN, ADOPT)),
]


@pytest.mark.parametrize(("change", "step"), STEPS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_is_as_it_was(
    name: str, change: str, step: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the step is done several times, as in wrappers, the last one fails."""
    made = [_begun(name) for _ in range(2)]
    calls = _planted(made[0], CHANGES[change], step, 0, monkeypatch)
    before = held(made[1])
    assert _planted(made[1], CHANGES[change], step, calls, monkeypatch) == calls > 0
    made[1].check()
    assert held(made[1]) == before
    # It goes on as if nothing had been tried.
    feed(made[1], 1)
    made[1].check()


def _begun(name: str) -> PlanningCache:
    """Two sequences that have begun alike."""
    cache = samples()[name].make()
    feed(cache, 9)
    cache.copy_prefix(0, 1, 9)
    feed(cache, 1)
    return cache


def _planted(
    cache: PlanningCache,
    change: Callable[[PlanningCache], object],
    step: tuple[type, str],
    last: int,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """Make a change in which one call of a method throws when it is done; returns how many there were."""
    owner, method = step
    original, calls = getattr(owner, method), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*given, **named)
        if calls == last:
            raise Planted
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, counted)
        try:
            change(cache)
        except Planted:
            return calls
    assert not last, "nothing was thrown"
    return calls


@pytest.mark.parametrize("name", list(samples()))
def test_what_an_edit_has_ended_is_not_taken_out(name: str) -> None:
    """Only a batch that is under way has a way back; an edit inside it is one the caller has seen succeed."""
    cache = _begun(name)
    with pytest.raises(Planted), cache.forward(Batch([10], [0])):
        cache.copy_prefix(0, 2, 5)
        raise Planted
    assert [cache.end(sequence) for sequence in (0, 2)] == [11, 5]
    cache.check()


@pytest.mark.parametrize("has_put", [False, True])
def test_a_put_that_fails_leaves_what_was_put_before(has_put: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CausalCache()
    cache.init(mx.float32)
    with cache.forward(Batch.run(0, 0, 3)):
        if has_put:
            cache.put(*coded(range(3)))
        again = _planted(cache, lambda _: cache.put(*coded(range(7, 10))), (Pair, "write"), 1, monkeypatch)
        assert again == 1
        if has_put:
            assert column(cache.get()[0]) == [0, 1, 2]
        else:
            with pytest.raises(CacheError, match="no put"):
                cache.get()
            cache.put(*coded(range(3)))
    assert column(fed(cache, [3])[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["set_config", "set_layer"])
def test_what_a_wrapper_tells_its_children_all_of_them_know_or_none(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = CausalCache(), SlidingWindowCache(4)
    cache = WrapperCache(*children)
    if method == "set_layer":
        cache.init(mx.float32)
    given, name = (CacheConfig(padding=8), "_config") if method == "set_config" else (3, "_layer")
    before = [getattr(one, name) for one in (cache, *children)]

    step = SlidingWindowCache, method
    assert _planted(cache, lambda _: getattr(cache, method)(given), step, 1, monkeypatch) == 1
    assert [getattr(one, name) for one in (cache, *children)] == before
    getattr(cache, method)(given)
    assert [getattr(one, name) for one in (cache, *children)] == [given] * 3
