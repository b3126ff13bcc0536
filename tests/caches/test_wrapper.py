"""Several kinds as one: what happens to all, and what happens to none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import (
    Batch,
    Cache,
    CacheError,
    CacheFullError,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    EncoderCache,
    NotSupportedError,
    RecurrentCache,
    SlidingWindowCache,
    WrapperCache,
    attention,
    slide,
)
from mlx_kvcache.caches.base import KeyValueCache, PlanningCache
from tests.caches.data import coded, column
from tests.kinds import add_offsets


def made(*children: PlanningCache, **options: Any) -> WrapperCache:
    cache = WrapperCache(*children)
    cache.init(mx.float32, **({"capacity": 16} | options))
    return cache


def feed(cache: WrapperCache, positions: Sequence[int], sequence: int = 0) -> None:
    cache.start_forward(Batch(positions, [sequence] * len(positions)))
    for index, child in enumerate(cache._children):
        cache.set_layer_type(index)
        if isinstance(child, RecurrentCache):
            cache.put(mx.array(float(positions[-1])), sequence=sequence)
        elif not isinstance(child, EncoderCache):
            cache.put(*coded(positions))


def test_every_kind_is_a_cache() -> None:
    kinds = (CausalCache(), SlidingWindowCache(4), ChunkedAttentionCache(4), EncoderCache(), RecurrentCache())
    assert all(isinstance(cache, Cache) for cache in (*kinds, WrapperCache(*kinds)))


def test_sliding_the_context_of_all_children() -> None:
    cache = made(CausalCache(add_offsets), SlidingWindowCache(8, shift=add_offsets, sinks=2))
    feed(cache, range(7))
    assert slide(cache, 0, keep=2) == 2
    assert {child.end(0) for child in cache._children} == {5}
    feed(cache, [5])
    assert column(cache.get()[0]) == [0, 1, 2, 3, 4, 5]


def test_check_asks_every_child() -> None:
    cache = made(CausalCache(), RecurrentCache())
    feed(cache, [0, 1])
    cache.check()
    recurrent = cache._children[1]
    assert isinstance(recurrent, RecurrentCache)
    recurrent._streams[0] = recurrent._streams[0]._replace(end=0)
    with pytest.raises(AssertionError):
        cache.check()


def test_layer_types() -> None:
    causal: KeyValueCache = CausalCache()
    window: KeyValueCache = SlidingWindowCache(2)
    cache = made(causal, window)
    assert cache.underlying_cache is causal
    feed(cache, [0, 1, 2])
    assert cache.underlying_cache is window
    assert column(cache.get()[0]) == [0, 1, 2]
    cache.start_forward(Batch([3], [0]))
    assert cache.underlying_cache is causal
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"layer type must be 0 to 1, got {wrong}"):
            cache.set_layer_type(wrong)
    cache.set_layer(5)
    cache.put(*coded([3]))
    assert causal.layer(5).get()[0].shape[2] == 4
    cache.set_layer_type(1)
    with pytest.raises(CacheError, match="layer 5 has had no put"):
        cache.get()


def test_children_are_caches() -> None:
    with pytest.raises(TypeError, match="every argument must be a cache, got list"):
        WrapperCache([CausalCache()])  # type: ignore[arg-type]


def test_children_must_be_new_and_different() -> None:
    causal = CausalCache()
    for children in ((), (causal, causal)):
        with pytest.raises(ValueError, match="one or more different"):
            WrapperCache(*children)
    causal.init()
    with pytest.raises(CacheError, match="child 1"):
        made(CausalCache(), causal)


def test_a_refusal_by_one_changes_none() -> None:
    window, causal, recurrent = SlidingWindowCache(4, shift=add_offsets), CausalCache(), RecurrentCache()
    cache = made(window, causal, recurrent)
    feed(cache, range(12))
    calls: dict[type[Exception], list[Callable[[], object]]] = {
        NotSupportedError: [lambda: cache.remove(0, 9, 10), lambda: cache.remove(0, 11)],
        CacheFullError: [lambda: cache.start_forward(Batch.run(0, 12, 6))],
        ValueError: [lambda: cache.start_forward(Batch([13], [0])), lambda: cache.copy_prefix(0, 0, 1)],
    }
    before = [dict(window._table.sequences), dict(causal._table.sequences), dict(recurrent._streams)]
    for error, ways in calls.items():
        for call in ways:
            with pytest.raises(error):
                call()
            after = [dict(window._table.sequences), dict(causal._table.sequences), dict(recurrent._streams)]
            assert after == before
            cache.check()
    assert not cache.can_resume(0, 11)
    assert cache.can_resume(0, 12)
    feed(cache, [12])


def test_an_exception_takes_all_children_back() -> None:
    encoder, recurrent = EncoderCache(), RecurrentCache()
    cache = made(CausalCache(), SlidingWindowCache(3), encoder, recurrent)
    feed(cache, range(5))
    with pytest.raises(KeyError), cache.forward(Batch([5], [0])):
        cache.set_layer_type(2)
        cache.put(mx.ones(1), mx.ones(1))
        cache.set_layer_type(3)
        cache.put(mx.array(99.0))
        raise KeyError
    assert {child.end(0) for child in cache._children} == {5}
    feed(cache, [5])
    cache.start_forward(Batch([6], [0]))
    assert not encoder.encoder_cached
    [state] = recurrent.get()
    assert state is not None
    assert mx.array_equal(state, mx.array(5.0))


def test_causality_belongs_to_the_underlying_cache() -> None:
    cache = made(CausalCache(), CausalCache())
    cache.start_forward(Batch.run(0, 0, 3))
    cache.set_layer_type(1)
    cache.set_causal(CausalOptions((0,)))
    masks = []
    for index in (0, 1):
        cache.set_layer_type(index)
        cache.put(*coded(range(3)))
        masks.append(cache.get()[2])
    assert masks[0] == "causal"
    assert masks[1].tolist()[0] == [True, True, True]


def test_attention_on_the_underlying_cache() -> None:
    cache = made(CausalCache(), RecurrentCache(), WrapperCache(CausalCache()))
    q, k, v = mx.random.normal((3, 1, 2, 3, 8), key=mx.random.key(0))
    cache.start_forward(Batch.run(0, 0, 3))
    first = attention(q, k, v, cache, scale=1.0)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal")
    assert mx.allclose(first, expected)
    cache.set_layer_type(2)
    assert mx.allclose(attention(q, k, v, cache, scale=1.0), expected)
    cache.set_layer_type(1)
    with pytest.raises(NotSupportedError, match="layer type 1 is a RecurrentCache"):
        attention(q, k, v, cache, scale=1.0)


def test_closing_and_order() -> None:
    cache = WrapperCache(CausalCache(), EncoderCache())
    for call in (lambda: cache.put(*coded([0])), cache.get, lambda: cache.layer(0), lambda: cache.end(0)):
        with pytest.raises(CacheError, match="init must come first"):
            call()
    cache.init(mx.float32)
    feed(cache, [0])
    assert cache.nbytes > 0
    cache.close()
    assert cache.nbytes == 0
    with pytest.raises(CacheError, match="closed"):
        cache.get()
