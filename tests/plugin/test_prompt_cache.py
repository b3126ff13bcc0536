"""Prompt caches as applications use them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlx_kvcache import CacheError, CacheFullError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.running import difference, logits_of, plain
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + i * i) % 97 for i in range(1200)]
MODEL = tiny_llama()


@pytest.fixture
def cache() -> PromptCache:
    return make_prompt_cache(MODEL)


def assert_goes_on(cache: PromptCache, tokens: list[int], model: nn.Module = MODEL) -> None:
    """The cache holds just these tokens, and answers as mlx-lm's would."""
    assert cache.position == len(tokens)
    theirs = plain(model)
    logits_of(model, theirs, list(tokens))
    probe = TEXT[500:503]
    ours = cache.fork()
    assert difference(logits_of(model, ours, probe), logits_of(model, theirs, probe)) <= 2e-5


def test_rewinding(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:300], 64)
    cache.rewind(0)
    cache.rewind(44)
    assert_goes_on(cache, TEXT[:256])
    cache.rewind_to(10)
    logits_of(MODEL, cache, TEXT[700:705])
    assert_goes_on(cache, TEXT[:10] + TEXT[700:705])
    assert cache.can_resume(15) and not cache.can_resume(16) and not cache.can_resume(-1)
    assert (cache.resume_point(7), cache.resume_point(99)) == (7, 15)
    cache.remove(3)
    assert_goes_on(cache, TEXT[:3])


def test_ranges_that_are_not_there(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    calls: dict[str, Callable[[], object]] = {
        "cannot rewind 21 tokens: the cache holds 20": lambda: cache.rewind(21),
        "cannot rewind -1 tokens": lambda: cache.rewind(-1),
        "position 21: expected 0 to 20": lambda: cache.rewind_to(21),
        r"\[8, 4\): expected 0 <= begin <= end <= 20": lambda: cache.remove(8, 4),
        r"\[-2, 4\): expected 0 <= begin <= end <= 20": lambda: cache.remove(-2, 4),
        r"\[2, 400\): expected 0 <= begin <= end <= 20": lambda: cache.remove(2, 400),
        r"\[20, 40\): expected 0 <= begin <= end <= 20": lambda: cache.remove(20, 40),
        r"\[21, 20\): expected 0 <= begin <= end <= 20": lambda: cache.remove(21),
        "got -3": lambda: cache.resume_point(-3),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    cache.remove(20)
    cache.remove(20, 20)
    cache.remove(7, 7)
    assert_goes_on(cache, TEXT[:20])


def test_a_forward_that_throws_leaves_no_trace(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    original = llama.MLP.__call__
    calls = []

    def failing(self: llama.MLP, x: mx.array) -> Any:
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("in layer 1")
        return original(self, x)

    ways: tuple[Callable[[], object], ...] = (lambda: None, lambda: cache.rewind(0))
    for after in ways:
        calls.clear()
        monkeypatch.setattr(llama.MLP, "__call__", failing)
        with pytest.raises(RuntimeError):
            logits_of(MODEL, cache, TEXT[30:35])
        monkeypatch.setattr(llama.MLP, "__call__", original)
        assert cache.position == 20
        after()
        assert_goes_on(cache, TEXT[:20])
    # Straight into the next forward, of the same size and of another.
    for tokens in (TEXT[40:45], TEXT[50:51]):
        start = cache.position
        calls.clear()
        monkeypatch.setattr(llama.MLP, "__call__", failing)
        with pytest.raises(RuntimeError):
            logits_of(MODEL, cache, TEXT[30:35])
        monkeypatch.setattr(llama.MLP, "__call__", original)
        logits_of(MODEL, cache, tokens)
        assert cache.position == start + len(tokens)
    assert_goes_on(cache, TEXT[:20] + TEXT[40:45] + TEXT[50:51])


def test_an_unfinished_forward_does_not_disturb_a_fork(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    fork = cache.fork()
    cache[0].make_mask(4)
    cache[0].update_and_fetch(mx.zeros((1, 2, 4, 8)), mx.zeros((1, 2, 4, 8)))
    logits_of(MODEL, fork, TEXT[60:64])
    assert_goes_on(fork, TEXT[:20] + TEXT[60:64])
    assert_goes_on(cache, TEXT[:20])


def test_forwards_of_one_pool_do_not_interleave(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    fork = cache.fork()
    kv = mx.zeros((1, 2, 4, 8))
    cache[0].make_mask(4)
    cache[0].update_and_fetch(kv, kv)
    logits_of(MODEL, fork, TEXT[60:64])
    with pytest.raises(CacheError, match="in the middle of a forward"):
        cache[1].update_and_fetch(kv, kv)
    assert cache.position == 20
    logits_of(MODEL, cache, TEXT[20:23])
    assert_goes_on(cache, TEXT[:23])
    assert_goes_on(fork, TEXT[:20] + TEXT[60:64])


def test_arrays_that_are_none(cache: PromptCache) -> None:
    ints = mx.ones((1, 2, 3, 8), mx.int32)
    with pytest.raises(ValueError, match="int32, expected floats"):
        cache[0].update_and_fetch(ints, ints)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), expected"):
        cache[0].update_and_fetch(mx.ones((1, 2, 3)), mx.ones((1, 2, 3)))
    assert cache.position == 0
    logits_of(MODEL, cache, TEXT[:5])
    assert_goes_on(cache, TEXT[:5])


def test_a_forward_without_masks(cache: PromptCache) -> None:
    kv = mx.ones((1, 2, 3, 8))
    for layer in cache:
        layer.update_and_fetch(kv, kv)
    assert cache.position == 3
    cache[0].update_and_fetch(kv, kv)
    with pytest.raises(CacheError, match="unfinished"):
        cache[0].update_and_fetch(kv, kv)
    assert cache.position == 3 and [layer.offset for layer in cache] == [3, 3, 3]


def test_forks_share_until_they_write(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:1000])
    one = cache.pool.nbytes
    forks = [cache.fork() for _ in range(8)]
    assert cache.pool.nbytes == one
    assert sum(fork.nbytes for fork in forks) == 8 * cache.nbytes
    for i, fork in enumerate(forks):
        logits_of(MODEL, fork, TEXT[i : i + 3])
    assert cache.pool.nbytes < 1.6 * one
    for i, fork in enumerate(forks[:2]):
        assert_goes_on(fork, TEXT[:1000] + TEXT[i : i + 3])
    assert_goes_on(cache, TEXT[:1000])
    for fork in forks[:4]:
        fork.close()
    del forks, fork
    gc.collect()
    assert cache.pool.nbytes == one
    cache.close()
    assert cache.pool.nbytes == 0


def test_a_deep_copy_is_a_fork(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    twin = copy.deepcopy(cache)
    assert twin.pool is cache.pool
    logits_of(MODEL, twin, TEXT[30:34])
    assert_goes_on(cache, TEXT[:20])
    assert_goes_on(twin, TEXT[:20] + TEXT[30:34])


def test_a_deep_copy_of_some_layers_is_a_fork(cache: PromptCache) -> None:
    """mlx-lm hands out slices, which are plain lists."""
    logits_of(MODEL, cache, TEXT[:20])
    before = cache.pool.nbytes
    twin = copy.deepcopy(cache[:3])
    assert twin[0].rows is twin[2].rows is not cache[0].rows
    assert cache.pool.nbytes == before
    logits_of(MODEL, twin, TEXT[30:34])
    assert twin[1].offset == 24
    assert_goes_on(cache, TEXT[:20])


def test_use_after_close(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    fork = cache.fork()
    cache.close()
    cache.close()
    for call in (
        lambda: cache.position,
        lambda: cache.fork(),
        lambda: cache.rewind(1),
        lambda: cache.remove(1, 2),
        lambda: logits_of(MODEL, cache, [1]),
    ):
        with pytest.raises(CacheError, match="closed"):
            call()
    assert_goes_on(fork, TEXT[:20])


def test_trim_as_mlx_lm_calls_it(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 5) == 5
    assert_goes_on(cache, TEXT[:15])
    assert trim_prompt_cache(cache, 100) == 15
    assert cache.position == 0 and all(layer.offset == 0 and layer.empty() for layer in cache)
    logits_of(MODEL, cache, TEXT[:6])
    cache[1].trim(2)
    with pytest.raises(CacheError, match="layer 0 is told to trim 3, others to trim 2"):
        cache[0].trim(3)
    assert cache.position == 4


def test_capacity_refuses_before_anything_is_computed() -> None:
    cache = make_prompt_cache(MODEL, capacity=32)
    logits_of(MODEL, cache, TEXT[:30])
    with pytest.raises(CacheFullError) as caught:
        logits_of(MODEL, cache, TEXT[30:35])
    assert (caught.value.needed, caught.value.free, caught.value.capacity) == (5, 2, 32)
    assert cache.position == 30
    cache.remove(4, 14)
    logits_of(MODEL, cache, TEXT[30:35])
    assert cache.position == 25


@pytest.mark.parametrize("n", [28, 29, 33, 90])
def test_a_block_that_no_shift_makes_room_for_is_fed_in_smaller_ones(n: int) -> None:
    """By half the room at once, as somebody who feeds these blocks would."""
    whole, pieces = (make_prompt_cache(MODEL, capacity=32, overflow="shift", sinks=4) for _ in range(2))
    for cache in (whole, pieces):
        logits_of(MODEL, cache, TEXT[:30])
    size = n if n <= 28 else 14
    assert difference(logits_of(MODEL, whole, TEXT[:n]), logits_of(MODEL, pieces, TEXT[:n], size)) <= 1e-5
    assert whole.position == pieces.position <= 32
    assert whole.gaps == pieces.gaps


def test_layers_that_are_driven_by_hand_are_told_of_blocks_that_are_too_long() -> None:
    cache = make_prompt_cache(MODEL, capacity=32, overflow="shift", sinks=4)
    logits_of(MODEL, cache, TEXT[:30])
    with pytest.raises(CacheFullError, match="29 cells needed, 28 free of a capacity of 32: feed smaller"):
        cache[0].make_mask(29)
    assert cache.position == 30


@pytest.mark.parametrize("n", [1, 6])
def test_masks_equal_mlx_lm(cache: PromptCache, n: int) -> None:
    theirs = plain(MODEL)
    for both in (cache, theirs):
        logits_of(MODEL, both, TEXT[:9])
    for more in ({}, {"return_array": True}, {"window_size": 4}, {"return_array": True, "window_size": 4}):
        options = {"return_array": False, "window_size": None} | more
        ours, expected = cache[0].make_mask(n, **options), theirs[0].make_mask(n, **options)
        if isinstance(expected, mx.array):
            assert mx.array_equal(ours, expected), more
        else:
            assert ours == expected, more


def test_options_out_of_range() -> None:
    for options in (
        {"capacity": 0},
        {"overflow": "drop"},
        {"rewind": -1},
        {"sinks": -1},
        {"capacity": 8, "sinks": 8},
        {"capacity": 8, "sinks": 8, "overflow": "shift"},
    ):
        with pytest.raises(ValueError, match="must be"):
            make_prompt_cache(MODEL, **options)
    with pytest.raises(TypeError, match="int"):
        make_prompt_cache(3)  # type: ignore[arg-type]


def test_a_batch_of_rows_is_refused(cache: PromptCache) -> None:
    with pytest.raises(ValueError, match="input has 2 rows, but the prompt cache has 1"):
        MODEL(mx.array([[1, 2, 3], [4, 5, 6]]), cache=cache)
    assert cache.position == 0
    logits_of(MODEL, cache, TEXT[:5])
    assert_goes_on(cache, TEXT[:5])
