"""Random calls, some interrupted, on encoders, recurrences and a wrapper of both with attention."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CausalCache, EncoderCache, NotSupportedError, RecurrentCache, WrapperCache
from tests.interrupts import Planted, Tracer
from tests.kinds import add_offsets

SEEDS = int(os.environ.get("MACHINE_SEEDS", "4")) // 10 or 1
STEPS = int(os.environ.get("MACHINE_STEPS", "200"))
FAULTS = float(os.environ.get("MACHINE_FAULTS", "0.04"))
SEQUENCES = range(4)
LAYERS = range(2)


@dataclass(frozen=True)
class Stream:
    """The truth of a sequence: a serial number for each token, and what it looks at."""

    tokens: tuple[int, ...] = ()
    input_at: int | None = None
    input_serial: int = 0

    @property
    def end(self) -> int:
        return len(self.tokens)

    def without(self, begin: int, stop: int) -> Stream:
        at = self.input_at
        if at is not None and begin <= at:
            at = None if at < stop else at - (stop - begin)
        return Stream(self.tokens[:begin] + self.tokens[stop:], at, self.input_serial)


@dataclass
class World:
    """A cache, what it must hold, and the calls that change both."""

    cache: Any
    random: Random
    serial: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache.init(mx.float32, max_sequences=4, capacity=10_000, max_batch=64)
        self.children = list(getattr(self.cache, "_children", [self.cache]))
        self.recurrent = next((c for c in self.children if isinstance(c, RecurrentCache)), None)
        self.encoder = next((c for c in self.children if isinstance(c, EncoderCache)), None)

    def of(self, sequence: int) -> Stream:
        return self.streams.get(sequence, Stream())

    def forward(self) -> None:
        many = self.encoder is None and self.random.random() < 0.3
        chosen = self.random.sample(SEQUENCES, 2 if many else 1)
        counts = {s: self.random.choice([1, 1, 1, 2, 5, 9]) for s in chosen}
        positions = [self.of(s).end + i for s, n in counts.items() for i in range(n)]
        sequences = [s for s, n in counts.items() for _ in range(n)]
        looks = self.encoder is not None and self.random.random() < 0.3
        marked = (self.random.randrange(len(positions)),) if looks and self.random.random() < 0.5 else ()
        batch = Batch(positions, sequences, marked)
        first, self.serial = self.serial, self.serial + len(positions)
        after = {}
        for s in counts:
            own = tuple(first + i for i, owner in enumerate(sequences) if owner == s)
            at, number = self.of(s).input_at, self.of(s).input_serial
            if looks:
                at, number = positions[marked[0] if marked else 0], first
            after[s] = Stream(self.of(s).tokens + own, at, number)
        refused = self.recurrent is not None and not all(
            self.recurrent.can_resume(s, self.of(s).end) for s in chosen
        )
        fails = self.random.random() < 0.1
        self.attempt(lambda: self.run(batch, after, first, looks, fails), after, refused)

    def run(self, batch: Batch, after: dict[int, Stream], first: int, looks: bool, fails: bool) -> None:
        with self.cache.forward(batch):
            for index, child in enumerate(self.children):
                if child is not self.cache:
                    self.cache.set_layer_type(index)
                for layer in LAYERS:
                    handle = self.cache.layer(layer)
                    if child is self.recurrent:
                        self.put_states(handle, after, layer)
                    elif child is self.encoder:
                        if looks:
                            handle.put(*(mx.full((1, 1, 3, 2), first + layer) for _ in range(2)))
                    else:
                        keys = mx.array(batch.positions, mx.float32)[None, None, :, None]
                        handle.put(keys, -keys)
                    if fails:
                        raise Planted

    def put_states(self, handle: Any, after: dict[int, Stream], layer: int) -> None:
        for sequence, stream in after.items():
            inside = handle.cache.wanted(sequence) if self.random.random() < 0.7 else ()
            for at in (*inside, None):
                number = stream.tokens[(at or stream.end) - 1]
                handle.put(mx.full((1, 2), float(number + layer)), sequence=sequence, at=at)

    def remove(self) -> None:
        sequence = self.random.choice(SEQUENCES)
        stream = self.of(sequence)
        begin = self.random.randint(0, stream.end)
        end = None if self.random.random() < 0.7 else begin + self.random.randint(0, 3)
        stop = stream.end if end is None else min(end, stream.end)
        refused = (
            begin < stop
            and self.recurrent is not None
            and (stop < stream.end or not self.recurrent.can_resume(sequence, begin))
        )
        after = {sequence: stream.without(begin, stop)} if begin < stop else {}
        self.attempt(lambda: self.cache.remove(sequence, begin, end), after, refused)

    def copy_prefix(self) -> None:
        src, dst = self.random.sample(SEQUENCES, 2)
        length = self.random.randint(0, self.of(src).end + 1)
        copied = self.of(src).without(length, self.of(src).end)
        self.attempt(lambda: self.cache.copy_prefix(src, dst, length), {dst: copied}, False)

    def restore(self) -> None:
        src, dst = self.random.sample(SEQUENCES, 2)
        plan = self.cache._plan_restore(dst, self.cache._snapshot(src))
        self.attempt(plan.commit, {dst: self.of(src)}, False)

    def attempt(self, call: Callable[[], object], after: dict[int, Stream], refused: bool) -> None:
        """Make a call that is refused, or interrupted, or changes these streams."""
        before = {s: self.of(s) for s in after}
        ends = {s: self.cache.end(s) for s in after}
        try:
            if self.random.random() < FAULTS:
                with Tracer(int(self.random.expovariate(1 / 80))):
                    call()
            else:
                call()
        except NotSupportedError:
            assert refused
            return
        except Planted:
            # Two states of one length look at the same things or differ in what is compared next.
            is_same = {s: self.cache.end(s) for s in after} == ends and self.matches(before)
            after = before if is_same else after
        else:
            assert not refused
        for sequence, stream in after.items():
            self.streams.pop(sequence, None)
            if stream.end:
                self.streams[sequence] = stream

    def matches(self, streams: dict[int, Stream]) -> bool:
        return all(self.equals(sequence, stream) for sequence, stream in streams.items())

    def equals(self, sequence: int, stream: Stream) -> bool:
        """Whether a sequence holds nothing but what belongs to this stream."""
        if any(child.end(sequence) != stream.end for child in self.children):
            return False
        if self.encoder is not None and stream.end:
            entry = self.encoder._streams[sequence].entry
            if (entry.position if entry else None) != stream.input_at:
                return False
            if entry and any(
                entry.layers[n][0][0, 0, 0, 0].item() != stream.input_serial + n for n in LAYERS
            ):
                return False
        if self.recurrent is not None and stream.end:
            for position, state in self.recurrent._streams[sequence].states.items():
                for layer, (array,) in state.items():
                    assert array is not None
                    if array[0, 0].item() != stream.tokens[position - 1] + layer:
                        return False
        return True

    def check(self) -> None:
        for child in self.children:
            child.check()
        assert self.matches({sequence: self.of(sequence) for sequence in SEQUENCES})


MAKERS: dict[str, Callable[[], Any]] = {
    "encoder": EncoderCache,
    "recurrent": lambda: RecurrentCache(4, 5),
    "recurrent without checkpoints": lambda: RecurrentCache(4, 0),
    "encoder and attention": lambda: WrapperCache(EncoderCache(), CausalCache(add_offsets)),
    "recurrent and attention": lambda: WrapperCache(CausalCache(add_offsets), RecurrentCache(1, 8)),
}


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_holds_what_was_put(make: Callable[[], Any], seed: int) -> None:
    world = World(make(), Random(seed))
    calls = [world.forward, world.remove, world.copy_prefix, world.restore]
    for _ in range(STEPS):
        world.random.choices(calls, [12, 5, 3, 1])[0]()
        world.check()
