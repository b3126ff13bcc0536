"""The block of `forward`: which layers must be put in it, and what is refused in it and after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import (
    Batch,
    CacheError,
    CausalCache,
    EncoderCache,
    Quantization,
    RecurrentCache,
    WrapperCache,
    attention,
    slide,
)
from tests.caches.data import coded, column, refused
from tests.kinds import KINDS, SINGLE_KINDS, Kind, add_offsets


def made(kind: Kind) -> Any:
    cache = kind.make(add_offsets)
    cache.init(mx.float32, max_sequences=2, capacity=32, max_batch=12)
    return cache


def children(cache: Any) -> list[Any]:
    return list(getattr(cache, "_children", [cache]))


def feed(cache: Any, n: int, layers: Iterable[int] = (0, 1), sequence: int = 0) -> None:
    """The next n tokens, in these layers of each child."""
    begin = cache.end(sequence)
    with cache.forward(Batch.run(sequence, begin, n)):
        for index, child in enumerate(children(cache)):
            if child is not cache:
                cache.set_layer_type(index)
            for layer in layers:
                cache.layer(layer).put(*coded(range(begin, begin + n)))


def seen(cache: Any) -> list[list[list[float]]]:
    """What one more token would see, in each layer of each child."""
    found = []
    cache.start_forward(Batch.run(0, cache.end(0), 1))
    for child in children(cache):
        for layer in child._store.layers:
            child.layer(layer).put(*coded([cache.end(0) - 1]))
            found.append([column(array) for array in child.layer(layer).get()[:2]])
    cache.remove(0, cache.end(0) - 1)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_that_is_not_put_is_named_and_the_batch_taken_out(kind: Kind) -> None:
    cache = made(kind)
    feed(cache, 5, (0, 1, 4))
    before = seen(cache)
    for given, named in (((0, 4), r"\[1\]"), ((1,), r"\[0, 4\]"), ((), r"\[0, 1, 4\]")):
        for n in (1, 3):
            with pytest.raises(
                CacheError, match=rf"layers {named} were put .* not in this one of {n} tokens"
            ):
                feed(cache, n, given)
            assert cache.end(0) == 5
            for child in children(cache):
                child.check()
    assert seen(cache) == before
    feed(cache, 3, (4, 1, 0))
    assert cache.end(0) == 8


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_sequences_need_every_layer_too(kind: Kind) -> None:
    cache = made(kind)
    feed(cache, 3)
    with pytest.raises(CacheError, match=r"layers \[1\] were put"):
        feed(cache, 2, (0,), sequence=1)
    assert cache.end(1) == 0
    feed(cache, 2, sequence=1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_that_comes_late_is_named_and_forgotten(kind: Kind) -> None:
    """Earlier tokens have no keys in it. Where none of them is held, nobody misses any."""
    cache = made(kind)
    feed(cache, 5)
    before = seen(cache)
    if not any(child._table[0].spans for child in children(cache)):
        feed(cache, 1, (0, 7, 1, 2))
        return
    with pytest.raises(CacheError, match=r"layers \[2, 7\] were not put for the 5 tokens of sequence 0"):
        feed(cache, 1, (0, 7, 1, 2))
    assert seen(cache) == before
    feed(cache, 1)
    assert cache.end(0) == 6


def test_a_layer_whose_put_failed_is_not_late() -> None:
    cache = made(SINGLE_KINDS[0])
    feed(cache, 5, (0,))
    with cache.forward(Batch.run(0, 5, 1)):
        with pytest.raises(ValueError, match="expected floats"):
            cache.layer(3).put(*(array.astype(mx.int32) for array in coded([5])))
        cache.layer(0).put(*coded([5]))
    feed(cache, 1, (0,))


@pytest.mark.parametrize("quantization", [None, Quantization(8, group_size=32)])
def test_attention_puts(quantization: Quantization | None) -> None:
    """By the short way of single tokens, by blocks, and by packed cells."""
    cache = CausalCache()
    cache.init(mx.float32, quantization=quantization)
    for n in (5, 1, 1, 3):
        q, k, v = mx.random.normal((3, 1, 2, n, 32), key=mx.random.key(n))
        with cache.forward(Batch.run(0, cache.end(0), n)):
            for layer in range(2):
                attention(q, k, v, cache.layer(layer), scale=1.0)
    q, k, v = mx.random.normal((3, 1, 2, 1, 32), key=mx.random.key(9))
    with pytest.raises(CacheError, match=r"layers \[1\]"), cache.forward(Batch.run(0, 10, 1)):
        attention(q, k, v, cache.layer(0), scale=1.0)
        attention(q, None, None, cache.layer(0), scale=1.0)
    assert cache.end(0) == 10


def test_a_wrapper_says_which_child_and_takes_all_back() -> None:
    cache = WrapperCache(RecurrentCache(), CausalCache(), CausalCache(), EncoderCache(), CausalCache())
    cache.init(mx.float32)

    def forward(*types: int) -> None:
        with cache.forward(Batch.run(0, cache.end(0), 2)):
            cache.layer(0).put(mx.array(float(cache.end(0))))
            for layer_type in types:
                cache.set_layer_type(layer_type)
                cache.put(*coded(range(2)))

    # The encoder is given once, and the last child never.
    forward(1, 2, 3)
    forward(1, 2)
    with pytest.raises(CacheError, match=r"layer type 2: layers \[0\] were put in earlier batches"):
        forward(1)
    assert {child.end(0) for child in cache._children} == {4}
    cache.set_layer_type(0)
    with cache.forward(Batch.run(0, 4, 1)):
        assert cache.get()[0].item() == 4.0
        for layer_type in (1, 2):
            cache.set_layer_type(layer_type)
            cache.put(*coded([4]))
    assert cache.end(0) == 5
    with pytest.raises(
        CacheError, match=r"layer type 4: layers \[0\] were not put for the 5 tokens of sequence 0"
    ):
        forward(1, 2, 4)
    forward(1, 2)


def test_encoders_and_states_may_stay_as_they_are() -> None:
    for cache in (EncoderCache(), RecurrentCache()):
        cache.init(mx.float32)
        with cache.forward(Batch([0], [0])):
            for layer in range(2):
                cache.layer(layer).put(mx.ones((1, 1, 1, 1)), mx.ones((1, 1, 1, 1)))
        with cache.forward(Batch([1], [0])):
            first = cache.layer(1).get()[0]
            assert first is not None and first.shape == (1, 1, 1, 1)
        assert cache.end(0) == 2


def test_a_pass_without_an_end_may_leave_layers_out() -> None:
    cache = made(SINGLE_KINDS[0])
    feed(cache, 2)
    cache.start_forward(Batch.run(0, 2, 1))
    cache.layer(0).put(*coded([2]))
    feed(cache, 1)
    assert cache.end(0) == 4


CACHES: dict[str, Any] = {str(kind): kind.make for kind in KINDS}
CACHES["encoder"] = lambda shift: EncoderCache()
CACHES["recurrent"] = lambda shift: RecurrentCache()
CACHES["all"] = lambda shift: WrapperCache(EncoderCache(), RecurrentCache(), CausalCache(shift))


def put_all(cache: Any, plus: float = 0) -> None:
    """One token, in one layer of each child."""
    for index, child in enumerate(children(cache)):
        if child is not cache:
            cache.set_layer_type(index)
        cache.layer(0).put(*(array + plus for array in coded([3])))


@pytest.mark.parametrize("name", CACHES)
def test_a_forward_inside_a_forward_leaves_the_outer_one(name: str) -> None:
    cache = CACHES[name](add_offsets)
    cache.init(mx.float32, capacity=32)
    with cache.forward(Batch([0], [0])):
        for batch in (Batch([1], [0]), Batch([0], [1])):
            for reserve in (False, True):
                with pytest.raises(CacheError, match="a forward pass is under way"):
                    cache.start_forward(batch, reserve)
            with pytest.raises(CacheError, match="a forward pass is under way"), cache.forward(batch):
                raise AssertionError
        put_all(cache)
    assert {child.end(0) for child in children(cache)} == {1} and cache.end(1) == 0
    with cache.forward(Batch([1], [0])):
        put_all(cache)
    with pytest.raises(KeyError), cache.forward(Batch([2], [0])):
        raise KeyError
    cache.start_forward(Batch([2], [0]))


@pytest.mark.parametrize("name", CACHES)
def test_nothing_is_put_after_the_block(name: str) -> None:
    cache = CACHES[name](add_offsets)
    cache.init(mx.float32, capacity=32)
    with cache.forward(Batch([0], [0])):
        put_all(cache)
    with pytest.raises(CacheError, match=r"cannot put: .* of 1 tokens is over.*start_forward"):
        put_all(cache, plus=9)
    for index, child in enumerate(children(cache)):
        if child is not cache:
            cache.set_layer_type(index)
        first = cache.layer(0).get()[0]
        assert first is not None and mx.array_equal(first, coded([3])[0])
    cache.start_forward(Batch([1], [0]))
    put_all(cache)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in SINGLE_KINDS], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_attention_after_the_block_only_reads(kind: Kind, n: int) -> None:
    cache = made(kind)
    q, k, v = mx.random.normal((3, 1, 2, n, 8), key=mx.random.key(1))
    for begin in (0, n):
        with cache.forward(Batch.run(0, begin, n)):
            inside = attention(q, k, v, cache, scale=1.0)
    with pytest.raises(CacheError, match=f"of {n} tokens is over"):
        attention(q, k + 1, v, cache, scale=1.0)
    for _ in range(2):
        assert mx.allclose(attention(q, None, None, cache, scale=1.0), inside, atol=1e-6)
    refused(cache, lambda: cache.put(k, v), CacheError, "is over")


def test_an_edit_inside_ends_the_batch() -> None:
    cache = made(SINGLE_KINDS[0])
    feed(cache, 3)
    with cache.forward(Batch.run(0, 3, 1)):
        slide(cache, 0, discard=1)
        with pytest.raises(CacheError, match="start_forward must come first"):
            cache.put(*coded([3]))
    assert cache.end(0) == 3
    feed(cache, 1)
