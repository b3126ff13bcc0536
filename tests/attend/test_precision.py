"""Attention in 16 bits, on every path, is as close to exact attention as MLX's own is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    Quantization,
    SlidingWindowCache,
    attention,
)
from mlx_kvcache.attend import cascade as joined
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.cells.visibility import visible
from mlx_kvcache.quantization import Codec
from mlx_kvcache.storage import codec as devices
from mlx_kvcache.storage.codec import packed
from tests.attend.test_attention import drawn
from tests.kinds import STORES
from tests.rounding import restored, transformed

HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 64, 32
SCALE = DIM**-0.5
LAYER = 1
MOST = 1.5
"""How many times MLX's own error is allowed."""
EPSILON = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


class World:
    """Feeds a cache, and compares each output with float64 and with MLX's own attention in 16 bits."""

    def __init__(
        self,
        cache: PositionalCache,
        dtype: mx.Dtype,
        quantization: Quantization | None = None,
        learned: bool = False,
    ) -> None:
        self.cache = cache
        self.dtype = dtype
        self.codecs = quantization.of(LAYER) if quantization else (None, None)
        self.rng = np.random.default_rng(3)
        self.tokens: dict[int, tuple[mx.array, mx.array]] = {}
        self.sinks = mx.array(self.rng.standard_normal(HEADS), dtype) if learned else None
        cache.init(dtype, max_sequences=4, capacity=2048, max_batch=1024, quantization=quantization)

    def feed(self, *runs: tuple[int, int], later: Iterable[int] = ()) -> None:
        """Attends with n more tokens of each sequence of `runs`, (sequence, n)."""
        places = [(s, self.cache.end(s) + i) for s, n in runs for i in range(n)]
        batch = Batch([p for _, p in places], [s for s, _ in places])
        q = mx.array(drawn(self.rng, (1, HEADS, len(places), DIM)), self.dtype)
        k, v = (
            mx.array(drawn(self.rng, (1, KV_HEADS, len(places), dim), codec), self.dtype)
            for dim, codec in zip((DIM, VALUE_DIM), self.codecs, strict=True)
        )
        with self.cache.forward(batch):
            self.cache.set_causal(CausalOptions(later))
            got = attention(q, k, v, self.cache.layer(LAYER), scale=SCALE, sinks=self.sinks)
        assert got.dtype == self.dtype
        begin, read = 0, [self.read(array, codec) for array, codec in zip((k, v), self.codecs, strict=True)]
        for sequence, n in runs:
            rows = slice(begin, begin + n)
            self.extend(sequence, *(array[:, :, rows] for array in read))
            inside = [index - begin for index in later if begin <= index < begin + n]
            self.compare(sequence, q[:, :, rows], got[:, :, rows], inside)
            begin += n

    def read(self, array: mx.array, codec: Codec | None) -> mx.array:
        """Keys or values as they are stored: with a transform, 16 bits do not hold them exactly."""
        if codec is None or codec.transform == "none":
            return array
        return packed(array, codec).decoded(mx.float32)

    def fork(self, sequence: int, *branches: int) -> None:
        for branch in branches:
            self.cache.copy_prefix(sequence, branch, self.cache.end(sequence))
            self.tokens[branch] = self.tokens[sequence]

    def extend(self, sequence: int, keys: mx.array, values: mx.array) -> None:
        old = self.tokens.get(sequence)
        new = keys, values
        self.tokens[sequence] = new if old is None else self.joined(old, new)

    def joined(self, *pairs: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        keys, values = zip(*pairs, strict=True)
        return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)

    def compare(self, sequence: int, queries: mx.array, got: mx.array, later: list[int]) -> None:
        keys, values = self.tokens[sequence]
        n, size = queries.shape[2], keys.shape[2]
        upper = np.isin(np.arange(n), later)[:, None]
        seen = visible(self.cache._rule, np.arange(size - n, size)[:, None], np.arange(size), upper)
        exact = exactly(queries, keys, values, seen, self.sinks)
        keys, values = keys.astype(self.dtype), values.astype(self.dtype)
        own = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=SCALE, mask=mx.array(seen), sinks=self.sinks
        )
        errors = [distance(own, exact), EPSILON[self.dtype] / 2]
        if n == 1 and any(self.codecs) and not devices.is_cpu():
            errors.append(distance(self.by_packed_products(queries, keys, values), exact))
        most = MOST * max(errors)
        assert distance(got, exact) <= most, (sequence, n)

    def by_packed_products(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """One token by MLX's products with packed arrays, which on a CPU sum in 16 bits."""

        def product(rows: mx.array, array: mx.array, codec: Codec | None, transpose: bool) -> mx.array:
            if codec is None:
                return rows @ (array.swapaxes(-1, -2) if transpose else array)
            form: Any = {"group_size": codec.group_size, "bits": codec.bits}
            if codec.transform == "none":
                return mx.quantized_matmul(rows, *mx.quantize(array, **form), transpose=transpose, **form)
            packs = mx.quantize(transformed(array), **form)
            found = mx.quantized_matmul(
                restored(rows) if transpose else rows, *packs, transpose=transpose, **form
            )
            return found if transpose else restored(found)

        rows = (queries * SCALE).reshape(1, KV_HEADS, -1, DIM)
        weights = mx.softmax(product(rows, keys, self.codecs[0], True), axis=-1, precise=True)
        return product(weights, values, self.codecs[1], False).reshape(1, HEADS, 1, VALUE_DIM)


def exactly(
    queries: mx.array, keys: mx.array, values: mx.array, seen: np.ndarray, sinks: mx.array | None
) -> np.ndarray:
    q, k, v = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (queries, keys, values))
    k, v = (np.repeat(array, HEADS // KV_HEADS, axis=1) for array in (k, v))
    scores = np.where(seen, q @ k.swapaxes(-1, -2) * SCALE, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(np.array(sinks.astype(mx.float32))[None, :, None, None] - highest)
    output: np.ndarray = weights @ v / total
    return output


def distance(found: mx.array, exact: np.ndarray) -> float:
    """Root of the mean square error, in parts of that of the exact output."""
    error = np.array(found.astype(mx.float32)) - exact
    return float(np.sqrt(np.square(error).mean() / np.square(exact).mean()))


def one_run(world: World) -> None:
    world.feed((0, 400))
    for n in (1, 1, 130, 5):
        world.feed((0, n))


def strangers(world: World) -> None:
    world.feed((0, 400), (1, 30))
    world.feed((1, 1), (0, 1))
    world.feed((0, 3), (1, 1), (2, 9))


def branches(world: World) -> None:
    """Runs that are long enough to be shared in one product."""
    world.feed((0, 400))
    world.fork(0, 1, 2)
    for runs in ([(0, 1), (1, 1), (2, 1)], [(0, 2), (1, 1), (2, 5)], [(1, 1)], [(2, 7)]):
        world.feed(*runs)
    world.fork(1, 3)
    world.feed((1, 1), (3, 1), (0, 1))


def several_runs(world: World) -> None:
    """A history in three pieces."""
    world.feed((0, 200))
    world.fork(0, 1)
    world.feed((1, 150))
    world.fork(1, 2)
    for n in (150, 1, 1, 4, 130):
        world.feed((2, n))
    world.feed((1, 1), (2, 1), (0, 1))


def image(world: World) -> None:
    world.feed((0, 200), later=range(20, 90))
    world.feed((0, 40), later=range(8))
    world.feed((0, 1))


CACHES: dict[str, Callable[[], PositionalCache]] = {
    "causal": CausalCache,
    "window": lambda: SlidingWindowCache(100),
    "window and sinks": lambda: SlidingWindowCache(100, sinks=5),
    "chunk": lambda: ChunkedAttentionCache(130, rewind=9),
}
Way = Callable[[World], None]
WAYS: list[Way] = [one_run, strangers, branches, several_runs, image]


@pytest.mark.parametrize("feed", WAYS, ids=lambda feed: feed.__name__)
@pytest.mark.parametrize("kind", CACHES)
def test_as_near_as_mlx(kind: str, feed: Way, device: str) -> None:
    """Each kind in each way in one of the types, and in the other as on the other device."""
    turn = list(CACHES).index(kind) + WAYS.index(feed) + (device == "GPU")
    feed(World(CACHES[kind](), list(EPSILON)[turn % 2]))


@pytest.mark.parametrize("dtype", EPSILON, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", CACHES)
def test_learned_sinks_as_near_as_mlx(kind: str, dtype: mx.Dtype, device: str) -> None:
    several_runs(World(CACHES[kind](), dtype, learned=True))


@pytest.mark.parametrize("store", list(STORES)[1:])
@pytest.mark.parametrize("feed", WAYS[1:4], ids=lambda feed: feed.__name__)
def test_packed_lanes_as_near_as_mlx(feed: Way, store: str, device: str) -> None:
    """The features are such as the codecs store exactly."""
    turn = list(STORES).index(store) + WAYS.index(feed) + (device == "GPU")
    feed(World(CausalCache(), list(EPSILON)[turn % 2], STORES[store]))


@pytest.mark.parametrize("dtype", EPSILON, ids=["bfloat16", "float16"])
def test_a_history_in_pieces_as_near_as_mlx(
    dtype: mx.Dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each branch by itself, where nothing is long enough to be shared."""
    monkeypatch.setattr(joined, "LONG", 1 << 20)
    several_runs(World(CausalCache(), dtype))
