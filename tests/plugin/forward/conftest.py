"""Steps that move in these tests are compared with one that is made for the same cells."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache.attend.part import Part
from mlx_kvcache.attend.step import Step
from mlx_kvcache.caches.causal import StepPlan
from mlx_kvcache.cells.placement import Placed
from mlx_kvcache.cells.spans import Span


@pytest.fixture(autouse=True)
def moved_as_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(self: StepPlan) -> bool:
        goes_on, cache, step = again(self), self._cache, self._step
        # All of a short text, and some of a long one.
        if goes_on and step and (self.made < 64 or self.made % 32 == 0):
            cache.check()
            placed = [_placed(part) for part in step.parts]
            made = Step(placed, step.n, cache._rule, cache._config, cache._store, cache._table)
            assert found_in(step) == found_in(made)
        return goes_on

    again = StepPlan.again
    monkeypatch.setattr(StepPlan, "again", checked)


def found_in(step: Step) -> list[Any]:
    """All that a step finds out about its cells, in values that compare by content."""
    found = step.parts, step.apart, step.stacks, step.whole, step.run, step.can_move, [*step._segments]
    return [_plain(value) for value in (*found, step.rows, step.later)]


def _placed(part: Part) -> Placed:
    n, last = part.end - part.begin, part.cells[-1]
    write = Span(last.segment, last.stop - n, part.begin, n)
    return Placed(part.sequence, part.indices, part.begin, part.end, (write,), part.cells, False)


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return [_plain(getattr(value, name)) for name in Part.__slots__]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, mx.array) else value
