"""K and V in fewer bits: what they take, when they are packed, and what is refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CausalCache,
    EncoderCache,
    Quantization,
    SlidingWindowCache,
    WrapperCache,
    attention,
    rope_shift,
)
from mlx_kvcache.caches.causal import Shift
from mlx_kvcache.storage.buffers import Pair, Store
from mlx_kvcache.storage.codec import Plain
from tests.caches.data import coded, column, fed
from tests.kinds import add_offsets

HEADS, DIM = 3, 64


def made(
    quantization: Quantization | None, dtype: mx.Dtype = mx.float16, shift: Shift | None = None
) -> CausalCache:
    cache = CausalCache(shift)
    cache.init(dtype, capacity=1024, quantization=quantization)
    return cache


def noise(n: int, seed: int = 0, dtype: mx.Dtype = mx.float16, dim: int = DIM) -> mx.array:
    return mx.random.normal((1, HEADS, n, dim), key=mx.random.key(seed)).astype(dtype)


def put(cache: CausalCache, kv: mx.array, sequence: int = 0, layer: int = 0) -> None:
    with cache.forward(Batch.run(sequence, cache.end(sequence), kv.shape[2])):
        cache.layer(layer).put(kv, kv)


def got(cache: CausalCache, layer: int = 0) -> tuple[mx.array, mx.array]:
    """Keys and values, with those of one more token that are zeros."""
    with cache.forward(Batch.run(0, cache.end(0), 1)):
        for known in list(cache._store.layers):
            cache.layer(known).put(*[mx.zeros((1, HEADS, 1, DIM))] * 2)
        keys, values, _ = cache.layer(layer).get()
    cache.remove(0, cache.end(0) - 1)
    return keys[:, :, :-1], values[:, :, :-1]


def distance(a: mx.array, b: mx.array) -> float:
    """Root of the mean square."""
    found = mx.sqrt(mx.square(a.astype(mx.float32) - b.astype(mx.float32)).mean()).tolist()
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    ("bits", "most", "error"),
    [
        (8, 0.54, 0.012),
        ((8, 4), 0.42, 0.12),
        (6, 0.41, 0.04),
        (5, 0.35, 0.08),
        (4, 0.29, 0.15),
        (3, 0.22, 0.3),
        (2, 0.16, 0.6),
    ],
)
def test_bytes_and_error(bits: Any, most: float, error: float, dtype: mx.Dtype) -> None:
    """Bytes are beside those of float16, whatever the dtype."""
    cache = made(Quantization(bits, recent=0), dtype)
    kv = noise(512, dtype=dtype)
    put(cache, kv)
    assert cache.nbytes <= most * 2 * HEADS * 512 * DIM * 2
    for array in got(cache):
        assert array.dtype == dtype
        assert distance(array, kv) < error


def test_bits_of_each_layer() -> None:
    cache = made(Quantization(lambda layer: None if layer == 2 else (8, 4)))
    kv = noise(100)
    with cache.forward(Batch.run(0, 0, 100)):
        for layer in range(3):
            cache.layer(layer).put(kv, kv)
    errors = [[distance(array, kv) for array in got(cache, layer)] for layer in range(3)]
    assert errors[2] == [0, 0]
    assert errors[0] == errors[1]
    assert 0 < 10 * errors[0][0] < errors[0][1]


def test_a_sequence_begins_in_float() -> None:
    cache = made(Quantization(4, after=200))
    kv = noise(200)
    put(cache, kv[:, :, :199])
    assert distance(got(cache)[0], kv[:, :, :199]) == 0
    put(cache, kv[:, :, 199:])
    before = cache.nbytes
    put(cache, noise(1, seed=1))
    assert distance(got(cache)[0][:, :, :200], kv) > 0.01
    put(cache, noise(1, seed=2))
    assert cache.nbytes < 0.4 * before
    cache.check()


def test_going_back_does_not_unpack() -> None:
    cache = made(Quantization(8, after=20))
    put(cache, noise(30))
    cache.remove(0, 10)
    for step in range(15):
        put(cache, noise(1, seed=step))
        cache.check()
    assert cache._table.packed == set(cache._table.owned())


def test_a_snapshot_of_a_branch_that_goes_on_in_float() -> None:
    """Its beginning is packed, what follows is not yet: both are restored as they were."""
    cache = made(Quantization(8, after=20))
    put(cache, noise(30))
    cache.copy_prefix(0, 1, 10)
    put(cache, noise(5, seed=1), sequence=1)
    packed = [span.segment in cache._table.packed for span in cache._table[1].spans]
    assert packed == [True, False]
    taken = cache._snapshot(1)
    assert [(run.begin, run.length) for run in taken.runs] == [(0, 10), (10, 5)]
    for sequence in (1, 2):
        if sequence == 2:
            cache._plan_restore(2, taken).commit()
        with cache.forward(Batch.run(sequence, 15, 1)):
            cache.layer(0).put(noise(1, seed=2), noise(1, seed=2))
            keys, _, _ = cache.layer(0).get()
        expected = mx.concatenate([noise(30)[:, :, :10], noise(5, seed=1), noise(1, seed=2)], axis=2)
        assert distance(keys[:, :, :10], expected[:, :, :10]) < 0.02
        assert distance(keys[:, :, 10:], expected[:, :, 10:]) == 0
    cache.check()


def test_a_forward_that_throws_leaves_what_was_in_float() -> None:
    cache = made(Quantization(2, after=20))
    kv = noise(20)
    put(cache, kv)
    with pytest.raises(RuntimeError), cache.forward(Batch.run(0, 20, 1)):
        cache.layer(0).put(noise(1), noise(1))
        raise RuntimeError
    assert cache.end(0) == 20
    cache.remove(0, 19)
    assert distance(got(cache)[0], kv[:, :, :19]) == 0
    cache.check()


def test_what_is_shared_and_packed_is_moved_to_a_packed_copy() -> None:
    cache = made(Quantization(8), shift=add_offsets)
    put(cache, noise(30))
    cache.copy_prefix(0, 1, 30)
    cache.remove(0, 10, 20)
    segments = [span.segment for span in cache._table[0].spans]
    assert len(segments) == 2 and set(segments) <= cache._table.packed
    assert all(pair.is_packed for pair in cache._store.layers[0].pairs.values())
    cache.check()


def test_what_is_shared_stays_in_float_while_it_is() -> None:
    cache = made(Quantization(4, after=50, recent=0))
    kv = noise(50)
    put(cache, kv)
    cache.copy_prefix(0, 1, 50)
    put(cache, noise(5, seed=1))
    new = got(cache)[0]
    assert distance(new[:, :, :50], kv) == 0 < distance(new[:, :, 50:], noise(5, seed=1))
    assert {span.segment in cache._table.packed for span in cache._table[0].spans} == {True, False}
    assert not any(span.segment in cache._table.packed for span in cache._table[1].spans)


@pytest.mark.parametrize("bits", [8, (8, 4), (None, 8)])
def test_removal_rotates_what_is_packed(bits: Any) -> None:
    shift = rope_shift(DIM)
    quantization = Quantization(bits, recent=0)
    packed, plain = made(quantization, mx.float32, shift), made(None, mx.float32, shift)
    for cache in (packed, plain):
        put(cache, noise(300, dtype=mx.float32))
        cache.remove(0, 100, 150)
    queries = noise(1, seed=9, dtype=mx.float32)
    outputs = []
    for cache in (packed, plain):
        with cache.forward(Batch.run(0, 250, 1)):
            outputs.append(attention(queries, queries, queries, cache, scale=1.0))
    limit = 0.01 if bits == 8 else 0.15
    assert 0 < distance(*outputs) < limit
    assert distance(got(packed)[0], got(plain)[0]) < 0.02


def test_removals_move_positions_exactly() -> None:
    """Through windows, and again and again."""
    cache = SlidingWindowCache(24, rewind=16, shift=add_offsets)
    cache.init(mx.float32, capacity=64, quantization=Quantization(8, group_size=32))
    dims = (32, 32)
    with cache.forward(Batch.run(0, 0, 40)):
        cache.put(*coded(range(40), dims=dims))
    for _ in range(5):
        end = cache.end(0)
        cache.remove(0, end - 10, end - 8)
        with cache.forward(Batch.run(0, end - 2, 2)):
            cache.put(*coded(range(end - 2, end), dims=dims))
            keys, _, _ = cache.get()
        assert column(keys) == list(range(end - len(column(keys)), end))


def test_numbers_beyond_16_bits_stay_finite() -> None:
    cache = made(Quantization(8), mx.float32)
    put(cache, noise(4, dtype=mx.float32) * 1e30)
    assert mx.isfinite(got(cache)[0]).all().item()


def test_other_kinds_keep_their_arrays() -> None:
    cache = WrapperCache(EncoderCache(), CausalCache())
    cache.init(mx.float32, quantization=Quantization(2, group_size=32))
    with cache.forward(Batch([0], [0])):
        odd = mx.random.normal((2, 5, 7), key=mx.random.key(0))
        cache.put(odd, odd)
        assert cache.get()[0] is odd


def test_widths_that_do_not_fit_are_refused_with_the_numbers() -> None:
    cache = CausalCache()
    with pytest.raises(ValueError, match="head_dim 80 is not a multiple of group_size 64; no supported"):
        cache.init(quantization=Quantization(8), head_dim=80)
    with pytest.raises(ValueError, match="head_dim 96 is not a multiple of group_size 64; use 32"):
        cache.init(quantization=Quantization(8), head_dim=96)
    cache.init(quantization=Quantization((None, 8)), head_dim=128)
    with cache.forward(Batch([0], [0])):
        with pytest.raises(ValueError, match="head_dim 80 of the values of layer 3"):
            cache.layer(3).put(noise(1, dim=80), noise(1, dim=80))
        assert cache.nbytes == 0
        cache.layer(3).put(noise(1, dim=80), noise(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, r"to 7 bits; supported: \(8, 6, 5, 4, 3, 2\)"),
        ({"bits": (8, 1)}, "to 1 bits"),
        ({"group_size": 16}, r"group_size 16 is not supported; supported: \(32, 64, 128\)"),
        ({"after": -1}, "after must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantization(**options)


def test_nothing_is_packed_without_bits() -> None:
    cache = made(Quantization(None))
    put(cache, noise(8))
    assert distance(got(cache)[0], noise(8)) == 0
    assert fed(made(None), range(3))[0].shape == (1, 1, 3, 2)


def test_reserving_takes_what_the_packed_room_will() -> None:
    """Long sequences are packed from their first token on, or may fill the room in float first."""
    taken = []
    for after in (0, 100):
        cache = CausalCache()
        cache.init(mx.float32, capacity=4096, quantization=Quantization(bits=4, after=after))
        before = mx.get_active_memory()
        cache.start_forward(Batch([0], [0]), reserve=True)
        cache.put(*[mx.zeros((1, HEADS, 1, DIM))] * 2)
        taken.append((mx.get_active_memory() - before) / (2 * 4096 * HEADS * DIM * 4))
        cache.close()
    assert taken[0] < 0.25
    assert 1 <= taken[1] < 1.1


def test_check_finds_float_where_it_is_packed() -> None:
    cache = made(Quantization(bits=8))
    put(cache, noise(3))
    cache.check()
    form, pairs = cache._store.layers[0].form, cache._store.layers[0].pairs
    [segment] = pairs
    pairs[segment] = Pair(form, Plain(noise(3)), Plain(noise(3)))
    with pytest.raises(AssertionError):
        cache.check()


def test_latents_and_8_bits_have_no_transform() -> None:
    """So that 8 bits with and without it are one, and share a pool."""
    assert Quantization(8) == Quantization(8, transform="none")
    assert Quantization(6) != Quantization(6, transform="none")
    store = Store(mx.float16, Quantization((8, 6)))
    for heads, value_dim, transforms in ((2, 64, ["none", "hadamard"]), (1, 64, ["none", "none"])):
        form = store.form_for(0, mx.zeros((1, heads, 1, 128)), mx.zeros((1, heads, 1, value_dim)))
        assert [codec and codec.transform for codec in form[5:7]] == transforms


def test_centers_that_do_not_fit_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"layer 2 has a center \(3,\), expected \(n_kv_heads, head_dim\)"):
        Quantization(4, centers={2: ([0, 1, 2], [0, 1, 2])})
    with pytest.raises(ValueError, match=r"layer 2 .* finite"):
        Quantization(4, centers={2: ([[np.nan]], [[0.0]])})
    cache = made(Quantization(4, centers={0: (np.ones((HEADS + 1, DIM)), np.ones((HEADS, DIM)))}))
    with pytest.raises(ValueError, match=f"keys of layer 0 .* each of {HEADS} heads of {DIM} features"):
        put(cache, noise(3))


def test_centers_are_of_transformed_layers_only() -> None:
    centers = {1: (np.ones((HEADS, DIM)), np.eye(HEADS, DIM))}
    assert Quantization(8, centers=centers) == Quantization(8)
    quantization = Quantization((8, 4), centers=centers)
    assert quantization == Quantization((8, 4), centers={1: (3 * np.ones((HEADS, DIM)), np.eye(HEADS, DIM))})
    assert quantization != Quantization((8, 4))
    keys, values = quantization.of(1)
    assert keys and values and not keys.center and values.center and not values.plain().center
    assert quantization.of(0) == Quantization((8, 4)).of(0)
