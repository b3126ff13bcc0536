"""Attention over mixed batches, against one fresh softmax per token."""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CacheConfig,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    SlidingWindowCache,
    attention,
)
from mlx_kvcache.attend import cascade as joined
from mlx_kvcache.attend.step import Step
from mlx_kvcache.caches.base import KeyValueCache
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.cells.visibility import Causal, Rule, visible
from mlx_kvcache.quantization import Codec
from tests.kinds import SINGLE_KINDS, STORES, Kind, add_offsets
from tests.rounding import restored

HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 32, 64
SCALE = DIM**-0.5
LAYER = 1


def drawn(rng: np.random.Generator, shape: tuple[int, ...], codec: Codec | None = None) -> np.ndarray:
    """Random features; for a codec such as it stores exactly: all its levels are powers of two apart."""
    if codec is None:
        return rng.standard_normal(shape).astype(np.float32)
    top = 2**codec.bits - 1
    levels = rng.integers(0, top + 1, shape)
    levels[..., :: codec.group_size], levels[..., 1 :: codec.group_size] = 0, top
    stored = (levels / 2.0 ** (codec.bits - 1)).astype(np.float32)
    return stored if codec.transform == "none" else np.array(restored(mx.array(stored)))


def drawn_batch(rng: np.random.Generator, store: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of n tokens for the layer that is tried."""
    quantization = STORES[store]
    codecs = quantization.of(LAYER) if quantization else (None, None)
    return (
        drawn(rng, (1, HEADS, n, DIM)),
        drawn(rng, (1, KV_HEADS, n, DIM), codecs[0]),
        drawn(rng, (1, KV_HEADS, n, VALUE_DIM), codecs[1]),
    )


class Fresh:
    """Keeps every token of every sequence, and computes one query at a time."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.tokens: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def attend(
        self,
        batch: Batch,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        sinks: np.ndarray | None,
        later: set[int],
    ) -> np.ndarray:
        for index in sorted(range(len(batch)), key=batch.positions.__getitem__):
            own = self.tokens.setdefault(batch.sequences[index], [])
            own.append((k[0, :, index], v[0, :, index]))
        result = np.zeros((1, HEADS, len(batch), VALUE_DIM))
        for index, (position, sequence) in enumerate(zip(batch.positions, batch.sequences, strict=True)):
            tokens = self.tokens[sequence]
            seen = [p for p in range(len(tokens)) if visible(self.rule, position, p, index in later)]
            for head in range(HEADS):
                kv = head * KV_HEADS // HEADS
                scores = [float(q[0, head, index] @ tokens[p][0][kv]) * SCALE for p in seen]
                if sinks is not None:
                    scores.append(float(sinks[head]))
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                for p, weight in zip(seen, weights, strict=False):
                    result[0, head, index] += weight * tokens[p][1][kv]
        return result


@pytest.mark.parametrize("learned", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", SINGLE_KINDS, ids=str)
def test_equals_a_fresh_softmax(kind: Kind, store: str, learned: bool, device: str) -> None:
    rng = np.random.default_rng(1)
    cache, fresh = kind.make(add_offsets), Fresh(kind.rule)
    assert isinstance(cache, PositionalCache)
    cache.init(mx.float32, max_sequences=3, capacity=64, max_batch=64, quantization=STORES[store])
    sinks = rng.standard_normal(HEADS).astype(np.float32) if learned else None
    ends = {0: 0, 3: 0, 7: 0}
    for step in range(12):
        tokens = []
        for sequence in rng.permutation(list(ends))[: rng.integers(1, 4)].tolist():
            n = int(rng.integers(1, 6)) if step % 4 else 1
            tokens += [(ends[sequence] + i, sequence) for i in range(n)]
            ends[sequence] += n
        if step % 2:
            rng.shuffle(tokens)
        batch = Batch([p for p, _ in tokens], [s for _, s in tokens])
        q, k, v = drawn_batch(rng, store, len(batch))
        later = {int(rng.integers(len(batch)))} if step % 3 == 0 else set()
        with cache.forward(batch):
            cache.set_causal(CausalOptions(later))
            layer = cache.layer(LAYER)
            learned_sinks = None if sinks is None else mx.array(sinks)
            ours = attention(mx.array(q), mx.array(k), mx.array(v), layer, scale=SCALE, sinks=learned_sinks)
        expected = fresh.attend(batch, q, k, v, sinks, later)
        assert np.abs(np.array(ours) - expected).max() < 1e-5, step


@pytest.mark.parametrize(
    "make",
    [
        lambda: SlidingWindowCache(100),
        lambda: SlidingWindowCache(300, rewind=20),
        lambda: SlidingWindowCache(100, sinks=5),
        lambda: ChunkedAttentionCache(64),
        lambda: ChunkedAttentionCache(130, rewind=9),
        lambda: ChunkedAttentionCache(10),
        CausalCache,
    ],
    ids=["window", "wide", "sinks", "chunk", "long", "short", "causal"],
)
def test_long_blocks_equal_one_masked_product(make: Callable[[], KeyValueCache], device: str) -> None:
    """Blocks are cut into stretches; the whole history and its mask say what must come out."""
    cache = make()
    cache.init(mx.float32, max_batch=400)
    for step, n in enumerate([70, 1, 333, 256, 64, 5, 130]):
        keys = mx.random.split(mx.random.key(step), 3)
        q, k, v = (
            mx.random.normal((1, heads, n, 8), key=key) for heads, key in zip((4, 2, 2), keys, strict=True)
        )
        with cache.forward(Batch.run(0, cache.end(0), n)):
            ours = attention(q, k, v, cache.layer(0), scale=SCALE)
            keys, values, mask = cache.layer(0).get()
        whole = mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE, mask=mask)
        assert mx.allclose(ours, whole, atol=1e-5), step


def test_keys_come_with_values() -> None:
    cache = CausalCache()
    cache.init(mx.float32)
    cache.start_forward(Batch([0], [0]))
    ones = mx.ones((1, 1, 1, 4))
    for keys, values, told in ((ones, None, "keys without values"), (None, ones, "values without keys")):
        with pytest.raises(ValueError, match=told):
            attention(ones, keys, values, cache, scale=1.0)
    assert cache.nbytes == 0


@pytest.mark.parametrize("reserve", [False, True])
def test_queries_are_of_the_batch(reserve: bool) -> None:
    cache = CausalCache()
    cache.init(mx.float32)
    cache.start_forward(Batch([0, 1, 0], [0, 0, 1]), reserve=reserve)
    keys = mx.zeros((1, 2, 3, 8))
    for shape in ((1, 4, 2, 8), (1, 4, 4, 8), (2, 4, 3, 8), (4, 3, 8)):
        told = rf"queries are {re.escape(str(shape))}, expected \(1, n_heads, 3, head_dim\)"
        with pytest.raises(ValueError, match=told):
            attention(mx.zeros(shape), keys, keys, cache, scale=1.0)
    assert attention(mx.zeros((1, 4, 3, 8)), keys, keys, cache, scale=1.0).shape == (1, 4, 3, 8)


def test_reserving_with_additive_masks() -> None:
    for dtype in (mx.float32, mx.bfloat16):
        cache = CausalCache()
        cache.set_config(CacheConfig(mask_dtype=dtype))
        cache.init(mx.float16, capacity=32)
        cache.start_forward(Batch.run(0, 0, 3), reserve=True)
        ones = mx.ones((1, 2, 3, 8), mx.float16)
        assert attention(ones, ones, ones, cache, scale=1.0).dtype == mx.float16


def test_on_the_current_layer() -> None:
    cache = CausalCache()
    cache.init(mx.float32)
    cache.start_forward(Batch([0, 1], [0, 0]))
    cache.set_layer(2)
    q, k, v = mx.random.normal((3, 1, 2, 2, 8), key=mx.random.key(1))
    output = attention(q, k, v, cache, scale=1.0)
    assert mx.allclose(output[:, :, 0], v[:, :, 0])
    assert cache.layer(2).get()[0].shape == (1, 2, 2, 8)


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 8), (2, 4), (2, 16)])
def test_shapes_that_do_not_fit_while_decoding(heads: int, dim: int) -> None:
    """The short way says so as any other, and the token is taken out again."""
    cache = CausalCache()
    cache.init(mx.float32)
    right = mx.random.normal((1, 2, 1, 8), key=mx.random.key(1))
    for n in (1, 2):
        with cache.forward(Batch.run(0, n - 1, 1)):
            attention(mx.repeat(right, 2, axis=1), right, right, cache.layer(0), scale=1.0)
    wrong = mx.zeros((1, heads, 1, dim))
    told = rf"keys and values of layer 0 are \(1, {heads}, 1, {dim}\) and \(1, 2, 1, 8\), expected"
    with pytest.raises(ValueError, match=told), cache.forward(Batch.run(0, 2, 1)):
        attention(mx.repeat(right, 2, axis=1), wrong, right, cache.layer(0), scale=1.0)
    whole = right.astype(mx.int32)
    for name, keys, values in (("keys", whole, right), ("values", right, whole)):
        told = f"{name} of layer 0 are mlx.core.int32, expected floats"
        with pytest.raises(ValueError, match=told), cache.forward(Batch.run(0, 2, 1)):
            attention(mx.repeat(right, 2, axis=1), keys, values, cache.layer(0), scale=1.0)
    assert cache.end(0) == 2
    cache.check()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", SINGLE_KINDS, ids=str)
def test_shared_runs_are_joined(kind: Kind, store: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of forks, at unequal lengths, in blocks and single tokens, mixed with a stranger."""
    monkeypatch.setattr(joined, "LONG", 1)
    rng = np.random.default_rng(2)
    cache, fresh = kind.make(add_offsets), Fresh(kind.rule)
    assert isinstance(cache, PositionalCache)
    cache.init(mx.float32, max_sequences=8, capacity=64, max_batch=64, quantization=STORES[store])
    cache.set_layer(LAYER)
    ends = dict.fromkeys(range(5), 0)
    times_joined = 0

    def feed(counts: dict[int, int]) -> None:
        nonlocal times_joined
        tokens = [(s, ends[s] + i) for s, n in counts.items() for i in range(n)]
        rng.shuffle(tokens)
        q, k, v = drawn_batch(rng, store, len(tokens))
        batch = Batch([p for _, p in tokens], [s for s, _ in tokens])
        with cache.forward(batch):
            got = attention(mx.array(q), mx.array(k), mx.array(v), cache, scale=SCALE)
        assert isinstance(cache._step, Step)
        times_joined += len(cache._step.once(joined.shared_runs))
        expected = fresh.attend(batch, q, k, v, None, set())
        assert np.abs(np.array(got) - expected).max() <= 1e-5
        for sequence, count in counts.items():
            ends[sequence] += count

    def fork(src: int, dst: int, length: int) -> None:
        cache.copy_prefix(src, dst, length)
        fresh.tokens[dst] = fresh.tokens[src][:length]
        ends[dst] = length

    feed({0: 12, 4: 3})
    for dst, length in ((1, 12), (2, 12)):
        fork(0, dst, length)
    for counts in ({0: 1, 1: 1, 2: 1}, {1: 3, 2: 1, 4: 1}, {0: 2, 1: 1, 2: 2, 4: 1}):
        feed(counts)
    fork(1, 3, ends[1])
    for counts in ({1: 1, 3: 1}, {0: 1, 1: 2, 2: 1, 3: 3, 4: 1}, {3: 1}):
        feed(counts)
    if isinstance(kind.rule, Causal):
        assert times_joined >= 5
