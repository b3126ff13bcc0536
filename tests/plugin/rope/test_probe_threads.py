"""Finding out about models in several threads, while others run theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.rope import probe
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_deepseek_v3, tiny_gpt2, tiny_llama

TOKENS = [(7 * i) % 90 for i in range(12)]
MODELS: list[Callable[[], nn.Module]] = [
    tiny_llama,
    tiny_gpt2,
    tiny_deepseek_v3,
    lambda: tiny_llama(rope_traditional=True, rope_theta=500.0),
    lambda: build("gemma3_text"),
]


def refusal_of(model: nn.Module) -> str | None:
    """Why tokens of a model cannot be moved, by the way that users find out."""
    try:
        cache = make_prompt_cache(model, capacity=40, overflow="shift")
        logits_of(model, cache, TOKENS)
    except Exception as error:  # noqa: BLE001  # compared
        return str(error)
    return cache.pool.scheme.refusal


def test_a_model_that_runs_in_another_thread_is_not_watched() -> None:
    original = mx.fast.rope
    expected = [refusal_of(model()) for model in MODELS]
    assert [text is None for text in expected] == [True, False, True, True, True]
    stop, ran, faults = threading.Event(), threading.Event(), list[Any]()

    def run() -> None:
        model = tiny_llama(head_dim=64, rope_theta=777.0)
        first = None
        while not stop.is_set():
            try:
                logits = logits_of(model, mlx_lm_cache.make_prompt_cache(model), TOKENS)
                first = logits if first is None else first
                if not mx.array_equal(logits, first):
                    faults.append("other logits")
            except Exception as error:  # noqa: BLE001  # told below
                faults.append(error)
            ran.set()

    runner = threading.Thread(target=run)
    runner.start()
    ran.wait()
    try:
        found = [refusal_of(model()) for _ in range(4) for model in MODELS]
    finally:
        stop.set()
        runner.join()
    assert found == expected * 4
    assert not faults
    assert mx.fast.rope is original


def test_models_are_watched_in_several_threads_at_once() -> None:
    original = mx.fast.rope
    built = [model() for model in MODELS * 4]
    expected = [refusal_of(model()) for model in MODELS]
    ready = threading.Barrier(4)

    def refusals(own: list[nn.Module]) -> list[str | None]:
        ready.wait()
        return [refusal_of(model) for model in own]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(refusals, [built[start::4] for start in range(4)]))
    for start, own in enumerate(found):
        assert own == (expected * 4)[start::4]
    assert mx.fast.rope is original


def test_one_model_in_several_threads_is_watched_once() -> None:
    model, ready = tiny_llama(), threading.Barrier(4)

    def scheme(_: int) -> Any:
        ready.wait()
        return make_prompt_cache(model, capacity=40, overflow="shift").pool.scheme

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(scheme, range(4)))
    assert len({id(one) for one in found}) == 1 and not found[0].refusal


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_recordings_that_overlap_put_the_function_back(first_ends_first: bool) -> None:
    """Also where somebody else replaces the function meanwhile."""
    original, x = mx.fast.rope, mx.ones((1, 1, 2, 8))

    def rotate(base: float) -> None:
        mx.fast.rope(x, 8, traditional=False, base=base, scale=1.0, offset=0)

    def wrapped(*args: Any, **kwargs: Any) -> mx.array:
        return inner(*args, **kwargs)

    one, two = probe._recorded(), probe._recorded()
    first = one.__enter__()
    rotate(1.0)
    inner = mx.fast.rope
    mx.fast.rope = wrapped
    second = two.__enter__()
    rotate(2.0)
    assert [shift.base for shift in first] == [1.0]
    assert [shift.base for shift in second] == [2.0]
    for ends in (one, two) if first_ends_first else (two, one):
        ends.__exit__(None, None, None)
    assert mx.fast.rope is wrapped
    mx.fast.rope = original
    rotate(3.0)
    assert (len(first), len(second)) == (1, 1)


def test_no_call_is_noted_that_is_too_wide_for_what_is_cached() -> None:
    """Rotations are tried on keys and values, which may be narrower than what else a model rotates."""
    narrow, wide = mx.ones((1, 1, 7, 4)), mx.ones((1, 1, 7, 8))
    with probe._recorded() as shifts:
        mx.fast.rope(wide, 8, traditional=False, base=10.0, scale=1.0, offset=0)
    assert probe._explanation(shifts, 5, narrow, 2 * narrow, 0) is None
