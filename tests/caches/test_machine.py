"""Random calls on every kind, each compared with the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mlx_kvcache import Batch, CacheError, CausalOptions
from tests.kinds import KINDS, STORES, Kind, add_offsets
from tests.oracle import Oracle

SEEDS = int(os.environ.get("MACHINE_SEEDS", "20"))
STEPS = int(os.environ.get("MACHINE_STEPS", "500"))
SEQUENCES = 4
LAYERS = 2


class Planted(Exception):
    """Thrown inside a forward."""


def outcome(call: Callable[..., object]) -> tuple[object, type[CacheError] | None]:
    """What a call returned, or the kind of error that it raised."""
    try:
        return call(), None
    except CacheError as error:
        return None, type(error)


def seen_sets(keys: mx.array, values: mx.array, mask: object, n: int) -> list[set[tuple[int, int]]]:
    """The (key, value) pairs that each of n queries sees of what `get` returned."""
    size = keys.shape[2]
    assert mx.isfinite(keys).all().item() and mx.isfinite(values).all().item()
    if mask is None:
        seen = np.ones((n, size), bool)
    elif isinstance(mask, str):
        assert mask == "causal"
        seen = np.tril(np.ones((n, size), bool), size - n)
    else:
        assert isinstance(mask, mx.array) and mask.shape == (n, size) and mask.dtype == mx.bool_
        seen = np.array(mask)
    pairs = list(
        zip(np.array(keys)[0, 0, :, 0].astype(int), np.array(values)[0, 0, :, 0].astype(int), strict=True)
    )
    rows = [[(int(k), int(v)) for (k, v), shown in zip(pairs, row, strict=True) if shown] for row in seen]
    assert all(len(set(row)) == len(row) for row in rows), "a token is there twice"
    return [set(row) for row in rows]


class Machine(RuleBasedStateMachine):
    """One rule that draws a seed: long runs stay cheap, still shrink, and mix all calls."""

    kind: Kind
    store: str

    def __init__(self) -> None:
        super().__init__()
        self.serial = 0
        self.cache: Any = self.kind.make(add_offsets)
        quantisation = STORES[self.store]
        self.dims = (2, 1) if quantisation is None else (32, 64)
        self.cache.init(mx.float32, max_sequences=3, capacity=12, max_batch=16, quantisation=quantisation)
        self.children = getattr(self.cache, "_children", [self.cache])
        self.oracles = [Oracle(rule, rewind, 36, shifts=True) for rule, rewind in self.kind.children]

    @rule(seed=st.integers(0, 2**32))
    def step(self, seed: int) -> None:
        random = Random(seed)
        calls = [self.forward, self.remove, self.copy_prefix, self.restore, self.reserve]
        random.choices(calls, [12, 6, 3, 1, 1])[0](random)

    def forward(self, random: Random) -> None:
        chosen = random.sample(range(SEQUENCES), random.choice([1, 1, 1, 2, 3]))
        longest = random.choice([1, 1, 4, 12])
        tokens = []
        for sequence in chosen:
            end = self.oracles[0].end(sequence)
            tokens += [(end + i, sequence) for i in range(random.randint(1, longest))]
        if random.random() < 0.5:
            random.shuffle(tokens)
        batch = Batch([p for p, _ in tokens], [s for _, s in tokens])
        if len(batch) > 16:
            before = self.bookkeeping()
            with pytest.raises(ValueError, match="max_batch"):
                self.cache.start_forward(batch)
            assert self.bookkeeping() == before
            return
        later = (
            set(random.sample(range(len(batch)), random.randint(0, len(batch))))
            if random.random() < 0.25
            else set()
        )
        # Numbers up to here are exact in any number of bits, where a head's features are all equal.
        self.serial %= 400
        values = [self.serial + i for i in range(len(batch))]
        self.serial += len(batch)
        fails = random.random() < 0.15
        before = self.bookkeeping()
        streams = [dict(oracle.streams) for oracle in self.oracles]
        expected, error = self.of_all(lambda oracle: oracle.forward(batch, values, later))
        _, raised = outcome(lambda: self.run(batch, values, later, expected, fails))
        assert raised == error, (batch, raised, error)
        if error:
            assert self.bookkeeping() == before
        if fails:
            for oracle, old in zip(self.oracles, streams, strict=True):
                oracle.streams = old

    def run(
        self, batch: Batch, values: list[Any], later: set[int], expected: list[Any] | None, fails: bool
    ) -> None:
        """A forward with two layers for each child, or one that fails half-way."""
        try:
            with self.cache.forward(batch):
                for index, sets in enumerate(expected or [None]):
                    if len(self.children) > 1:
                        self.cache.set_layer_type(index)
                    if later:
                        self.cache.set_causal(CausalOptions(later))
                    for layer in range(LAYERS):
                        k = mx.array(batch.positions, mx.float32)[None, None, :, None]
                        v = mx.array(values, mx.float32)[None, None, :, None] + layer * 0.25
                        shapes = [(1, 1, len(batch), dim) for dim in self.dims]
                        handle = self.cache.layer(layer)
                        handle.put(mx.broadcast_to(k, shapes[0]), mx.broadcast_to(v, shapes[1]))
                        if fails:
                            raise Planted
                        keys, got, mask = handle.get()
                        assert seen_sets(keys, got - layer * 0.25, mask, len(batch)) == sets
        except Planted:
            pass

    def remove(self, random: Random) -> None:
        sequence = random.randrange(SEQUENCES)
        end = self.oracles[0].end(sequence)
        begin = max(0, end - random.randint(0, 4)) if random.random() < 0.5 else random.randint(0, end + 1)
        stop = None if random.random() < 0.4 else begin + random.choice([0, 1, 2, 5, 100])
        before = self.bookkeeping()
        _, error = self.of_all(lambda oracle: oracle.remove(sequence, begin, stop))
        _, raised = outcome(lambda: self.cache.remove(sequence, begin, stop))
        assert raised == error, (sequence, begin, stop)
        if error:
            assert self.bookkeeping() == before

    def copy_prefix(self, random: Random) -> None:
        src, dst = random.sample(range(SEQUENCES), 2)
        length = random.randint(0, self.oracles[0].end(src) + 2)
        arrays = self.cache.nbytes
        self.of_all(lambda oracle: oracle.copy_prefix(src, dst, length))
        self.cache.copy_prefix(src, dst, length)
        assert self.cache.nbytes <= arrays

    def restore(self, random: Random) -> None:
        src, dst = random.sample(range(SEQUENCES), 2)
        before = self.bookkeeping()
        _, error = self.of_all(lambda oracle: oracle.restore(src, dst))
        _, raised = outcome(lambda: self.cache._plan_restore(dst, self.cache._snapshot(src)).commit())
        assert raised == error, (src, dst)
        if error:
            assert self.bookkeeping() == before

    def reserve(self, random: Random) -> None:
        n = random.randint(1, 16)
        before = self.bookkeeping()
        self.cache.start_forward(Batch.run(0, 0, n), reserve=True)
        self.cache.put(*(mx.zeros((1, 1, n, dim)) for dim in self.dims))
        keys, _, mask = self.cache.get()
        assert mx.isfinite(keys).all().item()
        assert isinstance(mask, mx.array)
        assert mask.shape == (n, keys.shape[2])
        assert self.bookkeeping() == before

    def bookkeeping(self) -> list[object]:
        return [(dict(child._table.sequences), child._table.live) for child in self.children]

    def of_all(self, call: Callable[[Oracle], object]) -> tuple[list[Any] | None, type[CacheError] | None]:
        """The call on every oracle, or on none and the first error."""
        streams = [dict(oracle.streams) for oracle in self.oracles]
        results = []
        for oracle in self.oracles:
            result, error = outcome(lambda oracle=oracle: call(oracle))
            if error:
                for each, old in zip(self.oracles, streams, strict=True):
                    each.streams = old
                return None, error
            results.append(result)
        return results, None

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        for child, oracle in zip(self.children, self.oracles, strict=True):
            assert child._table.live == oracle.live()
        for sequence in range(SEQUENCES):
            end = self.oracles[0].end(sequence)
            assert self.cache.end(sequence) == end
            for position in (0, *range(max(1, end - 12), end + 2)):
                expected = all(oracle.can_resume(sequence, position) for oracle in self.oracles)
                assert self.cache.can_resume(sequence, position) == expected, (sequence, position)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_the_oracle(kind: Kind, store: str) -> None:
    machine = type(f"Machine_{kind}", (Machine,), {"kind": kind, "store": store})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=SEEDS if store == "float" else max(1, SEEDS // 4),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
