"""Random calls on every kind, each compared with the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mlx_kvcache import Batch, CacheError, CausalOptions
from tests.interrupts import Planted, Tracer
from tests.kinds import KINDS, STORES, Kind, add_offsets
from tests.oracle import Oracle, Stream

SEEDS = int(os.environ.get("MACHINE_SEEDS", "4"))
STEPS = int(os.environ.get("MACHINE_STEPS", "200"))
"""Of a run; from about 1,000 on Hypothesis cuts most of them short."""
FAULTS = float(os.environ.get("MACHINE_FAULTS", "0.04"))
"""How many of the calls are interrupted at some line, or by the shift hook."""
SEQUENCES = 4
LAYERS = 2


def model_fails() -> None:
    raise Planted


def worker_fails() -> None:
    """A thread that the model waits for fails."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model_fails).result()


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
    calls: count[int]

    def __init__(self) -> None:
        super().__init__()
        self.serial = 0
        self.steps = 0
        self.cache: Any = self.kind.make(self.shift)
        self.hook_fails = False
        quantization = STORES[self.store]
        self.dims = (2, 1) if quantization is None else (32, 64)
        self.cache.init(mx.float32, max_sequences=3, capacity=12, max_batch=16, quantization=quantization)
        self.children = getattr(self.cache, "_children", [self.cache])
        self.oracles = [Oracle(rule, rewind, 36, shifts=True) for rule, rewind in self.kind.children]

    def shift(self, layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
        if self.hook_fails:
            raise Planted
        return add_offsets(layer, keys, offsets)

    @rule(seed=st.integers(0, 2**32))
    def step(self, seed: int) -> None:
        next(self.calls)
        self.steps += 1
        # Hypothesis begins with zeros alone, which would be the same call again and again.
        random = Random(seed or f"{self.kind}, {self.store}, {self.steps}")
        calls = [self.forward, self.remove, self.copy_prefix, self.graft, self.restore, self.reserve]
        random.choices(calls, [12, 6, 3, 3, 1, 1])[0](random)

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
        ends = [self.cache.end(sequence) for sequence in range(SEQUENCES)]
        before = self.bookkeeping()
        streams = self.streams()
        expected, error = self.of_all(lambda oracle: oracle.forward(batch, values, later))
        fault = random.choice([model_fails, worker_fails]) if random.random() < 0.15 else None
        try:
            with self.interrupted(random):
                _, raised = outcome(lambda: self.run(batch, values, later, expected, fault))
        except Planted:
            if [self.cache.end(sequence) for sequence in range(SEQUENCES)] == ends:
                self.back_to(streams)
            return
        assert raised == error, (batch, raised, error)
        if error:
            assert self.bookkeeping() == before

    def run(
        self,
        batch: Batch,
        values: list[Any],
        later: set[int],
        expected: list[Any] | None,
        fault: Callable[[], None] | None,
    ) -> None:
        """A forward with two layers for each child, or one that fails half-way."""
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
                    if fault:
                        fault()
                    keys, got, mask = handle.get()
                    assert seen_sets(keys, got - layer * 0.25, mask, len(batch)) == sets

    @contextmanager
    def interrupted(self, random: Random) -> Iterator[None]:
        """Calls inside are interrupted at some line, or not; or the shift hook fails."""
        if random.random() >= FAULTS:
            yield
        elif random.random() < 0.2:
            self.hook_fails = True
            try:
                yield
            finally:
                self.hook_fails = False
        else:
            # Most calls run fewer lines than that, so that they are disturbed early.
            with Tracer(int(random.expovariate(1 / 150))):
                yield

    def edit(
        self, random: Random, expect: Callable[[Oracle], object], call: Callable[[], object], what: object
    ) -> None:
        """A call between forwards: what the oracle says, or nothing where it is interrupted."""
        before, streams = self.bookkeeping(), self.streams()
        _, error = self.of_all(expect)
        try:
            with self.interrupted(random):
                _, raised = outcome(call)
        except Planted:
            if self.bookkeeping() == before:
                self.back_to(streams)
            return
        assert raised == error, what
        if error:
            assert self.bookkeeping() == before

    def remove(self, random: Random) -> None:
        sequence = random.randrange(SEQUENCES)
        end = self.oracles[0].end(sequence)
        begin = max(0, end - random.randint(0, 4)) if random.random() < 0.5 else random.randint(0, end + 1)
        stop = None if random.random() < 0.4 else begin + random.choice([0, 1, 2, 5, 100])
        self.edit(
            random,
            lambda oracle: oracle.remove(sequence, begin, stop),
            lambda: self.cache.remove(sequence, begin, stop),
            ("remove", sequence, begin, stop),
        )

    def copy_prefix(self, random: Random) -> None:
        src, dst = random.sample(range(SEQUENCES), 2)
        length = random.randint(0, self.oracles[0].end(src) + 2)
        arrays = self.cache.nbytes
        self.edit(
            random,
            lambda oracle: oracle.copy_prefix(src, dst, length),
            lambda: self.cache.copy_prefix(src, dst, length),
            ("copy", src, dst, length),
        )
        assert self.cache.nbytes <= arrays

    def graft(self, random: Random) -> None:
        source, sequence = random.sample(range(SEQUENCES), 2)
        ends = self.oracles[0].end(source), self.oracles[0].end(sequence)
        # Where the two are as long, positions do not move.
        begin = min(ends) if random.random() < 0.3 else random.randint(0, ends[0])
        end = begin + random.choice([0, 1, 2, 5, 100])
        self.edit(
            random,
            lambda oracle: oracle.graft(source, begin, end, sequence),
            lambda: self.cache.graft(source, begin, end, sequence),
            ("graft", source, begin, end, sequence),
        )

    def restore(self, random: Random) -> None:
        src, dst = random.sample(range(SEQUENCES), 2)
        self.edit(
            random,
            lambda oracle: oracle.restore(src, dst),
            lambda: self.cache._plan_restore(dst, self.cache._snapshot(src)).commit(),
            ("restore", src, dst),
        )

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

    def streams(self) -> list[dict[int, Stream]]:
        return [dict(oracle.streams) for oracle in self.oracles]

    def back_to(self, streams: list[dict[int, Stream]]) -> None:
        for oracle, old in zip(self.oracles, streams, strict=True):
            oracle.streams = old

    def bookkeeping(self) -> list[object]:
        return [(dict(child._table.sequences), child._table.live) for child in self.children]

    def of_all(self, call: Callable[[Oracle], object]) -> tuple[list[Any] | None, type[CacheError] | None]:
        """The call on every oracle, or on none and the first error."""
        streams = self.streams()
        results = []
        for oracle in self.oracles:
            result, error = outcome(lambda oracle=oracle: call(oracle))
            if error:
                self.back_to(streams)
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
    calls = count()
    machine = type(f"Machine_{kind}", (Machine,), {"kind": kind, "store": store, "calls": calls})
    seeds = SEEDS if store == "float" else max(1, SEEDS // 4)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=seeds,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Hypothesis ends a run early now and then.
    assert next(calls) >= 0.9 * STEPS * seeds, "runs were cut short"
