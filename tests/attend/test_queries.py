"""Queries that do not fit are refused with the numbers, on every path, and nothing has been put."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import (
    Batch,
    CacheError,
    CausalCache,
    EncoderCache,
    SlidingWindowCache,
    WrapperCache,
    attention,
)
from mlx_kvcache.attend import cascade as joined
from tests.caches.data import column
from tests.kinds import STORES

HEADS, DIM, VALUE_DIM = 2, 32, 64

WRONG: dict[str, tuple[tuple[int, ...], str]] = {
    "heads": ((1, 3, 0, DIM), "3 heads are not a multiple of layer 1's 2 K/V heads"),
    "fewer heads": ((1, 1, 0, DIM), "1 heads are not a multiple of layer 1's 2 K/V heads"),
    "no heads": ((1, 0, 0, DIM), "0 heads are not a multiple of layer 1's 2 K/V heads"),
    "head_dim": ((1, 4, 0, 16), "head_dim is 16, expected 32 as in the keys of layer 1"),
    "rows": ((2, 4, 0, DIM), "expected (1, n_heads, {n}, head_dim)"),
    "axes": ((4, 0, DIM), "expected (1, n_heads, {n}, head_dim)"),
    "tokens": ((1, 4, 1, DIM), "expected (1, n_heads, {n}, head_dim)"),
}
"""Shapes, in which the axis of the tokens is less by their number, and what is said of them."""


def shaped(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    return (*shape[:-2], shape[-2] + n, shape[-1])


def kv(n: int) -> tuple[mx.array, mx.array]:
    return mx.ones((1, HEADS, n, DIM)), mx.ones((1, HEADS, n, VALUE_DIM))


def batches(cache: Any) -> list[Batch]:
    """A token, a block, single tokens and blocks of several sequences, two of which share a run."""
    first, other, branch = (cache.end(sequence) for sequence in range(3))
    return [
        Batch([first], [0]),
        Batch.run(0, first, 3),
        Batch([first, other], [0, 1]),
        Batch([first, branch], [0, 2]),
        Batch([first, branch, branch + 1, other], [0, 2, 2, 1]),
        Batch([0], [3]),
        Batch.run(3, 0, 4),
    ]


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "make", [CausalCache, lambda: SlidingWindowCache(16, sinks=1)], ids=["causal", "window"]
)
def test_queries_that_do_not_fit(
    make: Any, store: str, what: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "LONG", 1)
    cache = make()
    cache.init(mx.float32, max_sequences=4, capacity=32, quantization=STORES[store])
    shape, said = WRONG[what]

    def attend(batch: Batch, queries: mx.array, is_shared: bool = False) -> mx.array:
        keys, values = (None, None) if is_shared else kv(len(batch))
        return attention(queries, keys, values, cache.layer(1), scale=1.0)

    def check(batch: Batch) -> None:
        wrong = shaped(shape, len(batch))
        told = re.escape(f"queries are {wrong}") + ".*" + re.escape(said.format(n=len(batch)))
        before = cache.end(batch.sequences[0])
        for reserve in (True, False):
            cache.start_forward(batch, reserve)
            with pytest.raises(ValueError, match=told):
                attend(batch, mx.ones(wrong))
            with pytest.raises(CacheError, match="no put in this batch"):
                cache.layer(1).get()
            attend(batch, mx.ones((1, 4, len(batch), DIM)))
            with pytest.raises(ValueError, match=told):
                attend(batch, mx.ones(wrong), is_shared=True)
        for sequence in batch.rows:
            cache.remove(sequence, cache.end(sequence) - len(batch.rows[sequence]))
        assert cache.end(batch.sequences[0]) == before

    check(Batch.run(0, 0, 2))
    with cache.forward(Batch([0, 1, 0], [0, 0, 1])):
        attend(Batch([0, 1, 0], [0, 0, 1]), mx.ones((1, 4, 3, DIM)))
    cache.copy_prefix(0, 2, 2)
    for index in range(len(batches(cache))):
        check(batches(cache)[index])
    cache.check()


@pytest.mark.parametrize("what", WRONG)
def test_queries_that_do_not_fit_an_encoders_output(what: str) -> None:
    encoder = EncoderCache()
    cache = WrapperCache(encoder, CausalCache())
    cache.init(mx.float32)
    shape, said = WRONG[what]
    wrong = mx.ones(shaped(shape, 2))
    with cache.forward(Batch.run(0, 0, 2)):
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(said.format(n=2))):
                attention(wrong, *kv(7), cache.layer(1), scale=1.0)
            assert not encoder.encoder_cached
        assert attention(mx.ones((1, 4, 2, DIM)), *kv(7), cache.layer(1), scale=1.0).shape == (
            1,
            4,
            2,
            VALUE_DIM,
        )
    with (
        cache.forward(Batch.run(0, 2, 2)),
        pytest.raises(ValueError, match=re.escape(said.format(n=2))),
    ):
        attention(wrong, None, None, cache.layer(1), scale=1.0)


def test_an_encoders_output_that_is_no_keys_and_values() -> None:
    cache = EncoderCache()
    cache.init(mx.float32)
    queries, (keys, values) = mx.ones((1, 4, 1, DIM)), kv(7)
    with cache.forward(Batch([0], [0])):
        for wrong, told in (
            ((mx.repeat(keys, 2, axis=0), values), r"keys of layer 0 are \(2, 2, 7, 32\), expected"),
            (
                (keys, values[:, :1]),
                r"values of layer 0 are \(1, 1, 7, 64\), expected \(1, 2, 7, value_dim\)",
            ),
            ((keys, values[:, :, :6]), r"values of layer 0 are \(1, 2, 6, 64\), expected"),
            ((keys, values[0]), r"values of layer 0 are \(2, 7, 64\), expected"),
        ):
            with pytest.raises(ValueError, match=told):
                attention(queries, *wrong, cache, scale=1.0)
            assert not cache.encoder_cached and not cache.nbytes


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("make", [CausalCache, EncoderCache])
def test_queries_and_sinks_of_the_wrong_type_or_number(make: Any, n: int, device: str) -> None:
    """Whole numbers would be answered in whole numbers."""
    cache = make()
    cache.init(mx.float32)
    queries = mx.ones((1, 4, n, DIM))
    with cache.forward(Batch.run(0, 0, n)):
        for wrong, sinks, told in (
            (queries.astype(mx.int32), None, "queries are mlx.core.int32, expected floats"),
            (queries, mx.ones((2,)), r"sinks are \(2,\), expected \(4,\): one for each query head"),
            (queries, mx.ones((4, 1)), r"sinks are \(4, 1\), expected \(4,\)"),
        ):
            for _ in range(2):
                with pytest.raises(ValueError, match=told):
                    attention(wrong, *kv(n), cache, scale=1.0, sinks=sinks)
            with pytest.raises(CacheError):
                cache.get()
        attention(queries, *kv(n), cache, scale=1.0, sinks=mx.ones((4,)))
    assert column(cache.get()[0]) == [1.0] * n


@pytest.mark.parametrize("learned", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("asked", [mx.float32, mx.float16, mx.bfloat16])
def test_outputs_have_the_type_of_the_queries(
    asked: mx.Dtype, stored: mx.Dtype, learned: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every path, whatever the type of keys and values."""
    monkeypatch.setattr(joined, "LONG", 1)
    cache, encoder = SlidingWindowCache(64), EncoderCache()
    sinks = mx.zeros((4,), asked) if learned else None

    def attend(given: Any, n: int) -> mx.Dtype:
        keys, values = (array.astype(stored) for array in kv(n))
        queries = mx.ones((1, 4, n, DIM), asked)
        return attention(queries, keys, values, given, scale=1.0, sinks=sinks).dtype

    for made in (cache, encoder):
        made.init(stored, max_sequences=4)
    with cache.forward(Batch.run(0, 0, 20)):
        assert attend(cache, 20) == asked
    cache.copy_prefix(0, 2, 20)
    for index in range(len(batches(cache))):
        batch = batches(cache)[index]
        for reserve in (True, False):
            cache.start_forward(batch, reserve)
            assert attend(cache, len(batch)) == asked
        cache.remove(3, 0)
    with cache.forward(Batch.run(0, cache.end(0), 300)):
        assert attend(cache, 300) == asked
    with encoder.forward(Batch.run(0, 0, 3)):
        assert attend(encoder, 3) == asked
