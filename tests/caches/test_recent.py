"""The newest tokens of quantized sequences, which are read as they were put."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import Batch, CausalCache, Quantization, SlidingWindowCache, attention, rope_shift
from mlx_kvcache.attend.step import Step
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.quantization import Codec
from tests.rounding import rounded

HEADS, DIM, RECENT = 2, 64, 5
CODEC = Codec(4, 64, "hadamard")


def made(cache: PositionalCache, after: int = 0) -> PositionalCache:
    cache.init(
        mx.float32, capacity=512, max_batch=64, quantization=Quantization(4, after=after, recent=RECENT)
    )
    return cache


class Texts:
    """Sequences of a cache beside their keys, which are also the values."""

    def __init__(self, cache: PositionalCache) -> None:
        self.cache = cache
        self.keys: dict[int, mx.array] = {}
        self.drawn = 0

    def forward(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """Adds tokens to sequences. Returns how many of the newest tokens of each are read unrounded."""
        positions: list[int] = []
        names: list[int] = []
        new = []
        for name, size in sizes.items():
            end = self.cache.end(name)
            positions += range(end, end + size)
            names += [name] * size
            self.drawn += 1
            new.append(mx.random.normal((1, HEADS, size, DIM), key=mx.random.key(self.drawn)))
            old = [self.keys[name]] if name in self.keys else []
            self.keys[name] = mx.concatenate([*old, new[-1]], axis=2)
        tokens = mx.concatenate(new, axis=2)
        queries = mx.random.normal(tokens.shape, key=mx.random.key(self.drawn)) / 8
        with self.cache.forward(Batch(positions, names)):
            found = attention(queries, tokens, tokens, self.cache, scale=1.0)
            keys, values, mask = self.cache.get()
            expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
        assert mx.allclose(found, expected, 1e-4, 1e-4)
        step = self.cache._step
        assert isinstance(step, Step)
        exact, start = {}, 0
        for part in step.parts:
            own, cells = self.keys[part.sequence][:, :, -part.size :], slice(start, start + part.size)
            exact[part.sequence] = self.unrounded(own, keys[:, :, cells], values[:, :, cells])
            start = cells.stop
        return exact

    def unrounded(self, own: mx.array, keys: mx.array, values: mx.array) -> int:
        """How many of the newest keys and values are as they were put; the others are rounded."""
        same = np.array((keys == own).all(axis=(0, 1, 3))).tolist()
        n = next((n for n, is_same in enumerate(reversed(same)) if not is_same), len(same))
        stop = own.shape[2] - n
        assert mx.array_equal(keys, values)
        assert mx.allclose(keys[:, :, :stop], rounded(own, CODEC)[:, :, :stop], 0, 1e-5)
        return n

    def remove(self, name: int, begin: int) -> None:
        self.cache.remove(name, begin)
        self.keys[name] = self.keys[name][:, :, :begin]

    def copy(self, source: int, name: int, length: int) -> None:
        self.cache.copy_prefix(source, name, length)
        self.keys[name] = self.keys[source][:, :, :length]


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_a_forward_sees_its_tokens_and_those_before_it_unrounded(kind: str) -> None:
    texts = Texts(made(CausalCache() if kind == "causal" else SlidingWindowCache(24)))
    held = 0
    for size in (30, 1, 1, 7, 1, 3, 20, 1, 1, 1, 2):
        assert texts.forward({0: size})[0] == held + size
        held = min(RECENT, held + size)


def test_an_undone_forward_changes_nothing() -> None:
    for size in (1, 3, 40):
        texts = Texts(made(CausalCache()))
        texts.forward({0: 30})
        end = texts.cache.end(0)
        with pytest.raises(KeyError), texts.cache.forward(Batch.run(0, end, size)):
            texts.cache.put(*[mx.ones((1, HEADS, size, DIM))] * 2)
            raise KeyError
        assert texts.forward({0: 2})[0] == RECENT + 2


def test_going_back_leaves_what_is_left_unrounded() -> None:
    texts = Texts(made(CausalCache()))
    texts.forward({0: 30})
    texts.remove(0, 28)
    assert texts.forward({0: 1})[0] == RECENT - 2 + 1
    texts.remove(0, 10)
    assert [texts.forward({0: 1})[0] for _ in range(8)] == [1, 2, 3, 4, 5, 6, 6, 6]


def test_rows_that_decode_together_keep_theirs() -> None:
    """Through a stack that others leave, in which some pause, and that grows."""
    texts = Texts(made(CausalCache()))
    for name, size in enumerate((30, 28, 40)):
        texts.forward({name: size})
    for _ in range(20):
        assert texts.forward({0: 1, 1: 1, 2: 1}) == dict.fromkeys((0, 1, 2), RECENT + 1)
    for _ in range(3):
        assert texts.forward({0: 1, 1: 1}) == dict.fromkeys((0, 1), RECENT + 1)
    assert texts.forward({2: 1})[2] == RECENT + 1
    assert texts.forward({2: 4})[2] == RECENT + 4
    texts.cache.remove(1, 0)
    for _ in range(RECENT):
        texts.forward({0: 1, 2: 1})
    assert texts.forward({0: 1, 2: 1}) == {0: RECENT + 1, 2: RECENT + 1}


def test_halves_of_a_stack_keep_theirs() -> None:
    """However far one is ahead of the other, and when they meet again."""
    texts = Texts(made(CausalCache()))
    for name in range(5):
        texts.forward({name: 30})
    all_rows = dict.fromkeys(range(5), 1)
    for names in (range(5), range(2), range(3, 5), range(2), range(3, 5), [1], [0], range(5)):
        for _ in range(8):
            found = texts.forward(dict.fromkeys(names, 1))
            assert set(found.values()) == {RECENT + 1}, (names, found)
    assert texts.forward(all_rows) == dict.fromkeys(range(5), RECENT + 1)


def test_what_begins_in_float_goes_on_unrounded() -> None:
    texts = Texts(made(CausalCache(), after=20))
    assert texts.forward({0: 20})[0] == 20
    assert [texts.forward({0: 1})[0] for _ in range(3)] == [RECENT + 1] * 3


def test_a_snapshot_keeps_them() -> None:
    texts, other = Texts(made(CausalCache())), Texts(made(CausalCache()))
    texts.forward({0: 30})
    other.cache._plan_restore(0, texts.cache._snapshot(0)).commit()
    other.keys[0] = texts.keys[0]
    assert other.forward({0: 1})[0] == RECENT + 1


def test_a_removal_keeps_as_many_only() -> None:
    cache = made(CausalCache(rope_shift(DIM)))
    texts = Texts(cache)
    texts.forward({0: 60})
    before = cache.nbytes
    cache.remove(0, 10, 20)
    assert cache.nbytes == before


@pytest.mark.parametrize("seed", range(6))
def test_every_key_is_as_it_was_put_or_rounded(seed: int) -> None:
    """Sequences that come, go, fork, pause and go back, alone and together."""
    random, texts = Random(seed), Texts(made(CausalCache()))
    for _ in range(80):
        names = list(texts.keys)
        choice = random.random()
        if not names or choice < 0.1:
            texts.forward({random.randrange(6): random.randint(1, 30)})
        elif choice < 0.2:
            source, name = random.choice(names), random.randrange(6)
            if source != name:
                texts.copy(source, name, random.randint(1, texts.keys[source].shape[2]))
        elif choice < 0.3:
            name = random.choice(names)
            texts.remove(name, random.randint(1, texts.keys[name].shape[2]))
        elif choice < 0.35:
            name = random.choice(names)
            texts.cache.remove(name, 0)
            del texts.keys[name]
        else:
            chosen = random.sample(names, random.randint(1, len(names)))
            for _ in range(random.choice([1, 1, 4])):
                found = texts.forward(dict.fromkeys(chosen, 1))
                assert all(1 <= n <= RECENT + 1 for n in found.values())
        texts.cache.check()
