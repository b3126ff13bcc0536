"""Rows that join, leave, fork and go back at random, against a fresh computation of each row's tokens."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_kvcache.caches import causal
from mlx_kvcache.cells.placement import Placement, place
from mlx_kvcache.cells.stacks import PATIENCE
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import VOCABULARY, tiny_llama

SHARED = 280
"""Longer than what is copied to a stack."""


class Batch:
    """Rows of a batch, and the tokens that each has read."""

    def __init__(self, model: nn.Module, seed: int, prefix: int, options: dict[str, Any]) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.options = options
        self.origins: list[tuple[list[int], Any]] = [([], make_prompt_cache(model, **options))]
        """Stored conversations from which rows begin: their tokens, and a cache of these."""
        for length in (prefix, prefix, prefix + 20) if prefix else ():
            tokens, cache = self.drawn(length), make_prompt_cache(model, **options)
            mx.eval(model(mx.array([tokens]), cache=cache))
            self.origins.append((tokens, cache))
        self.rows: list[list[int]] = []
        self.layers: list[Any] = []
        self.kept: list[Any] = []
        """Other caches of the same tokens."""
        self.stacked = 0

    def drawn(self, n: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(n)]

    def join(self) -> None:
        own = self.drawn(self.random.choice([1, 3, 20, 21, 22, 40]))
        prefix, origin = self.random.choice(self.origins)
        cache = origin.fork()
        mx.eval(self.model(mx.array([own]), cache=cache))
        joining = [layer.merge([layer]) for layer in cache]
        for layer, other in zip(self.layers, joining, strict=False):
            layer.extend(other)
        self.layers = self.layers or joining
        self.rows.append([*prefix, *own])
        self.kept += [cache] * (self.random.random() < 0.5)

    def keep(self, rows: list[int]) -> None:
        for layer in self.layers:
            layer.filter(rows)
        self.rows = [list(self.rows[row]) for row in rows]

    def leave(self) -> None:
        count = self.random.randint(1, len(self.rows))
        self.keep(self.random.sample(range(len(self.rows)), count))

    def fork(self) -> None:
        self.keep([self.random.randrange(len(self.rows)) for _ in self.rows])

    def extract(self) -> None:
        row = self.random.randrange(len(self.rows))
        self.kept.append([layer.extract(row) for layer in self.layers])
        del self.kept[: self.random.randrange(2)]

    def go_back(self) -> None:
        n = self.random.randint(1, 3)
        if min(map(len, self.rows)) > n:
            for layer in self.layers:
                layer.trim(n)
            self.rows = [tokens[:-n] for tokens in self.rows]

    def step(self, n: int = 1) -> mx.array:
        new = [self.drawn(n) for _ in self.rows]
        logits: mx.array = self.model(mx.array(new), cache=self.layers)[:, -1]
        self.rows = [tokens + own for tokens, own in zip(self.rows, new, strict=True)]
        cache = self.layers[0].rows.pool.caches[0]
        cache.check()
        self.stacked += bool(cache._step.stacks)
        return logits

    def fresh(self) -> mx.array:
        """The logits after each row's last token, from a cache of its own."""

        def cache() -> Any:
            return make_prompt_cache(self.model, **self.options) if self.options else self.model.make_cache()

        return mx.stack([self.model(mx.array([tokens]), cache=cache())[0, -1] for tokens in self.rows])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("window", [None, 32])
def test_rows_that_come_and_go_equal_fresh_ones(window: int | None, bits: int | None, device: str) -> None:
    model = tiny_llama(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    for layer in model.layers:
        # Even attention, which notices a cell too many.
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight / 10
    model.make_cache = lambda: [RotatingKVCache(window) if window else KVCache() for _ in model.layers]
    options: dict[str, Any] = {"kv_bits": bits} if bits else {}
    stacked = 0
    for seed, prefix in enumerate((0, 20, SHARED)):
        batch = Batch(model, seed, prefix, options)
        for _ in range(3):
            batch.join()
        for _ in range(24):
            chosen = batch.random.random()
            if chosen < 0.5:
                batch.step(1 if chosen < 0.45 else 3)
            else:
                # A window can only go back as far as it keeps tokens.
                edits = [batch.join, batch.leave, batch.fork, batch.extract, *[batch.go_back] * (not window)]
                batch.random.choice(edits)()
        batch.join()
        for _ in range(PATIENCE + 2):
            logits = batch.step()
        assert mx.allclose(logits, batch.fresh(), rtol=0, atol=0.05 if bits else 1e-4)
        stacked += batch.stacked
    # Otherwise the trial of the model has found its rows to be wrong.
    assert batch.origins[0][1].pool.batching == "ragged"
    assert stacked > 20


def test_a_row_that_has_joined_is_stacked_when_the_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are planned anew once, and not again."""
    batch = Batch(tiny_llama(), 0, 0, {})
    for _ in range(3):
        batch.join()
    batch.step()
    batch.join()
    cache, planned = batch.layers[0].rows.pool.caches[0], list[bool]()

    def placed(*args: Any) -> Placement:
        planned.append(args[-1])
        return place(*args)

    monkeypatch.setattr(causal, "place", placed)
    rows = []
    for _ in range(PATIENCE + 4):
        logits = batch.step()
        rows.append([len(stack.parts) for stack in cache._step.stacks])
    assert rows == [[3]] * (PATIENCE + 1) + [[4]] * 3
    assert planned == [False, True]
    assert mx.allclose(logits, batch.fresh(), rtol=0, atol=1e-4)


def test_one_row_does_not_keep_the_memory_of_all() -> None:
    model = tiny_llama()
    caches = [make_prompt_cache(model) for _ in range(8)]
    for seed, cache in enumerate(caches):
        mx.eval(model(mx.array([[seed + 1] * 60]), cache=cache))
    pool, alone = caches[0].pool, caches[0].nbytes
    batch = [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]
    del cache, caches
    for _ in range(2):
        mx.eval(model(mx.array([[1]] * 8), cache=batch))
    assert pool.nbytes > 7 * alone
    left = [layer.extract(3) for layer in batch]
    before = left[0].state[0] + 0
    del batch
    assert pool.nbytes < 2 * alone
    assert mx.array_equal(left[0].state[0], before)
