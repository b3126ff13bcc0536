"""What cross-attention looks at."""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CacheError, CausalOptions, EncoderCache, attention


@pytest.fixture
def cache() -> EncoderCache:
    made = EncoderCache()
    made.init(mx.float16)
    return made


def put(
    cache: EncoderCache, batch: Batch, n: int = 5, layers: Iterable[int] = (0,), dtype: mx.Dtype = mx.float32
) -> None:
    cache.start_forward(batch)
    keys, values = mx.full((1, 2, n, 4), n, dtype), mx.full((1, 2, n, 3), -n, dtype)
    for layer in layers:
        cache.layer(layer).put(keys, values)


def held(cache: EncoderCache, sequence: int = 0) -> int | None:
    stream = cache._streams.get(sequence)
    return stream.entry and stream.entry.position if stream else None


def test_returned_as_stored_in_every_later_batch(cache: EncoderCache) -> None:
    put(cache, Batch.run(0, 0, 3), n=7)
    for position in (3, 4):
        keys, values, mask = cache.get()
        assert keys.shape == (1, 2, 7, 4)
        assert values.shape == (1, 2, 7, 3)
        assert keys.dtype == mx.float32
        assert mask is None
        cache.start_forward(Batch([position], [0]))
    put(cache, Batch([5], [0]), n=2, dtype=mx.bfloat16)
    assert cache.get()[0].shape == (1, 2, 2, 4)
    assert cache.get()[0].dtype == mx.bfloat16


def test_the_input_belongs_to_its_token(cache: EncoderCache) -> None:
    put(cache, Batch.run(0, 0, 6))
    assert held(cache) == 0
    put(cache, Batch([6, 7, 8], [0] * 3, multimodal=[0, 1]))
    assert held(cache) == 7
    cache.remove(0, 1, 4)
    assert held(cache) == 4
    assert cache.end(0) == 6
    cache.remove(0, 5)
    assert held(cache) == 4
    assert cache.encoder_cached
    cache.remove(0, 2, 99)
    assert held(cache) is None
    assert not cache.encoder_cached
    assert cache.end(0) == 2
    assert cache.can_resume(0, 77)


def test_removing_beside_an_input(cache: EncoderCache) -> None:
    put(cache, Batch([0, 1, 2, 3], [0] * 4, multimodal=[2]))
    cache.remove(0, 3)
    assert held(cache) == 2
    cache.remove(0, 0, 2)
    assert (held(cache), cache.end(0)) == (0, 1)


def test_a_new_input_takes_the_place_of_all_layers(cache: EncoderCache) -> None:
    put(cache, Batch([0], [0]), layers=(0, 1))
    put(cache, Batch([1], [0]), n=9, layers=(1,))
    assert cache.layer(1).get()[0].shape[2] == 9
    with pytest.raises(CacheError, match="no encoder output in layer 0"):
        cache.layer(0).get()


def test_a_prefix_shares_what_lies_in_it(cache: EncoderCache) -> None:
    put(cache, Batch([0, 1, 2, 3], [0] * 4, multimodal=[2]))
    before = cache.nbytes
    cache.copy_prefix(0, 1, 3)
    cache.copy_prefix(0, 2, 1)
    cache.copy_prefix(0, 3, 99)
    cache.copy_prefix(9, 3, 1)
    assert [held(cache, s) for s in range(4)] == [2, 2, None, None]
    assert [cache.end(s) for s in range(4)] == [4, 3, 1, 0]
    assert cache.nbytes == before
    cache.start_forward(Batch([3], [1]))
    assert cache.encoder_cached
    assert mx.array_equal(cache.get()[0], mx.full((1, 2, 5, 4), 5.0))
    cache.start_forward(Batch([1], [2]))
    assert not cache.encoder_cached


def test_safe_when_empty(cache: EncoderCache) -> None:
    cache.remove(0, 0)
    cache.remove(3, 1, 2)
    cache.copy_prefix(0, 1, 5)
    assert not cache.encoder_cached
    cache.start_forward(Batch([0], [0]))
    with pytest.raises(CacheError, match="sequence 0 has no encoder output in layer 0"):
        cache.get()
    cache.set_causal(CausalOptions((0,)))
    with pytest.raises(ValueError, match="index 3 is out of range for a batch of 1"):
        cache.set_causal(CausalOptions((3,)))
    assert cache.nbytes == 0


def test_one_sequence_for_put_and_get(cache: EncoderCache) -> None:
    put(cache, Batch([0], [4]))
    cache.start_forward(Batch([0, 1], [0, 4]))
    assert not cache.encoder_cached
    for call in (cache.get, lambda: cache.put(mx.ones(1), mx.ones(1))):
        with pytest.raises(CacheError, match="batch of one sequence, this has 2"):
            call()
    with pytest.raises(ValueError, match="sequence 4 ends at 2"):
        cache.start_forward(Batch([9], [4]))


def test_an_exception_brings_the_last_input_back(cache: EncoderCache) -> None:
    put(cache, Batch([0], [0]), n=3)
    with pytest.raises(KeyError), cache.forward(Batch([1], [0])):
        cache.put(mx.ones((1, 1, 8, 1)), mx.ones((1, 1, 8, 1)))
        raise KeyError
    cache.start_forward(Batch([1], [0]))
    assert cache.get()[0].shape[2] == 3


def test_reserving_stores_nothing(cache: EncoderCache) -> None:
    cache.start_forward(Batch([0], [0]), reserve=True)
    cache.put(mx.ones((1, 2, 5, 4)), mx.ones((1, 2, 5, 4)))
    assert cache.get()[0].shape == (1, 2, 5, 4)
    assert cache.nbytes == 0
    assert cache.end(0) == 0


def test_attention_looks_at_everything(cache: EncoderCache) -> None:
    q, k, v = mx.random.normal((3, 1, 2, 6, 8), key=mx.random.key(0))
    cache.start_forward(Batch.run(0, 0, 2))
    first = attention(q[:, :, :2], k, v, cache, scale=1.0)
    cache.start_forward(Batch([2], [0]))
    later = attention(q[:, :, 2:3], None, None, cache.layer(0), scale=1.0)
    whole = mx.fast.scaled_dot_product_attention(q[:, :, :3], k, v, scale=1.0)
    assert mx.allclose(mx.concatenate([first, later], axis=2), whole, atol=1e-6)


def test_attention_to_what_are_no_keys(cache: EncoderCache) -> None:
    for sequence, shape in enumerate([(1, 2, 3), (2, 3), (1, 0, 3, 8), (1, 1, 2, 3, 8)]):
        cache.start_forward(Batch([0], [sequence]))
        cache.put(mx.zeros(shape), mx.zeros(shape))
        told = rf"keys of layer 0 are {re.escape(str(shape))}, expected \(1, n_kv_heads, S, head_dim\)"
        with pytest.raises(ValueError, match=told):
            attention(mx.zeros((1, 2, 1, 8)), None, None, cache, scale=1.0)


@pytest.mark.parametrize(("end", "position"), [(0, None), (2, -1), (2, 2), (2, 3)])
def test_check_finds_what_cannot_be(cache: EncoderCache, end: int, position: int | None) -> None:
    cache.start_forward(Batch([0], [0]))
    cache.put(mx.zeros((1, 2, 3, 8)), mx.zeros((1, 2, 3, 8)))
    cache.check()
    stream = cache._streams[0]
    assert stream.entry is not None
    entry = None if position is None else stream.entry._replace(position=position)
    cache._streams[0] = stream._replace(end=end, entry=entry)
    with pytest.raises(AssertionError):
        cache.check()
