"""Buffers that get longer, under a model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama


def test_arrays_that_somebody_holds_stay_as_they_are() -> None:
    """Buffers are assigned to in place; what has been handed out is not."""
    model = tiny_llama()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    keys, state = cache[0].keys, cache[0].state
    before = np.array(keys), np.array(state[0])
    mx.eval(model(mx.array([[4, 5]]), cache=cache))
    cache.rewind(4)
    mx.eval(model(mx.array([[6, 7, 8, 9]]), cache=cache))
    assert np.array_equal(before[0], np.array(keys)) and np.array_equal(before[1], np.array(state[0]))
