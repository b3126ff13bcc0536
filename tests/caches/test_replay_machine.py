"""Random calls, some interrupted, on recurrences that compute states again from their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CausalCache, NotSupportedError, RecurrentCache, WrapperCache
from mlx_kvcache.caches.recurrent import Arrays
from tests.interrupts import Planted, Tracer
from tests.kinds import add_offsets

SEEDS = int(os.environ.get("MACHINE_SEEDS", "4")) // 10 or 1
STEPS = int(os.environ.get("MACHINE_STEPS", "200"))
FAULTS = float(os.environ.get("MACHINE_FAULTS", "0.04"))
SEQUENCES = range(4)
LAYERS = range(2)
PRIME = 65_521


class Broken(Exception):
    """Raised by `replay`."""


def fold(layer: int, number: int, tokens: Iterable[int]) -> int:
    """A recurrence whose states tell all histories apart."""
    for token in tokens:
        number = (31 * number + token + layer + 1) % PRIME
    return number


def state_of(layer: int, number: int) -> Arrays:
    return mx.array([[number + layer]]), None


def number_in(state: Arrays) -> int:
    assert state[0] is not None
    return int(state[0].item())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stream:
    """The truth of a sequence.

    Attributes:
        read: for each position, the tokens that a state there may have read. There are two answers where
            tokens were removed but not from the states.
        noted: for each token, whether all layers gave their inputs.
        seams: the positions whose states do not follow from those before.
        marks: the marked positions.
        floor: the first position from which no inputs have been dropped as too old.
    """

    read: tuple[frozenset[tuple[int, ...]], ...] = (frozenset({()}),)
    noted: tuple[bool, ...] = ()
    seams: frozenset[int] = frozenset()
    marks: frozenset[int] = frozenset()
    floor: int = 0

    @property
    def end(self) -> int:
        return len(self.noted)

    def cut(self, length: int) -> Stream:
        kept = {mark for mark in self.marks if mark <= length or length == self.end}
        seams = {seam for seam in self.seams if seam < length}
        read, noted, floor = self.read[: length + 1], self.noted[:length], min(self.floor, length + 1)
        return Stream(read, noted, frozenset(seams), frozenset(kept), floor)

    def known(self, source: int, position: int) -> bool:
        """Whether the state at `position` follows from that at `source` and known inputs."""
        return all(self.noted[source:position]) and not any(source < s < position for s in self.seams)


@dataclass
class World:
    """A cache, what it must hold, and the calls that change both."""

    cache: Any
    random: Random
    serial: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)
    breaks: bool = False
    replays: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache.init(mx.float32, max_sequences=4, capacity=10_000, max_batch=64)
        self.children = list(getattr(self.cache, "_children", [self.cache]))
        self.recurrent = next(child for child in self.children if isinstance(child, RecurrentCache))
        self.recurrent._replay = self.replay

    def replay(self, layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        if self.breaks:
            raise Broken
        tokens, double = inputs
        assert tokens.shape[0] == 1
        assert mx.array_equal(tokens * 2, double)
        self.replays.append(layer)
        number = number_in(arrays) - layer if arrays else 0
        return state_of(layer, fold(layer, number, (number_in((token,)) for token in tokens[0])))

    def of(self, sequence: int) -> Stream:
        return self.streams.get(sequence, Stream())

    def possible(self, sequence: int, position: int) -> bool:
        """Whether a checkpoint and the inputs since then lead to the state at `position`."""
        stream = self.of(sequence)
        held = self.recurrent._streams.get(sequence)
        checkpoints = held.checkpoints if held else [0]
        older = [p for p in checkpoints if p <= position <= stream.end]
        return bool(older) and stream.known(older[-1], position)

    def resumes(self, sequence: int, position: int) -> bool:
        """Whether the sequence can go back to a position. `check` tests what the cache says."""
        return bool(self.recurrent.can_resume(sequence, position))

    def forward(self) -> None:
        chosen = self.random.sample(SEQUENCES, self.random.choice([1, 1, 2]))
        counts = {s: self.random.choice([1, 1, 1, 2, 5, 9, 14]) for s in chosen}
        positions = [self.of(s).end + i for s, n in counts.items() for i in range(n)]
        batch = Batch(positions, [s for s, n in counts.items() for _ in range(n)])
        widest, rewind = max(counts.values()), self.recurrent._rewind
        gives = {s: self.random.random() < 0.9 for s in chosen}
        follows = {s: self.random.random() < 0.7 for s in chosen}
        after, rows = {}, []
        for s, n in counts.items():
            tokens = [self.serial + i for i in range(n)]
            self.serial += n
            rows.append([0] * (widest - n) + tokens)
            read = min(self.of(s).read[-1], key=len)
            reads = [frozenset({(*read, *tokens[: i + 1])}) for i in range(n)]
            # A long block needs a state where its inputs begin.
            m = n if n <= rewind or not follows[s] else max(1, rewind)
            noted = [bool(gives[s] and rewind and i >= n - m) for i in range(n)]
            old = self.of(s)
            floor = max(old.floor, old.end + n - rewind)
            after[s] = replace(old, read=(*old.read, *reads), noted=(*old.noted, *noted), floor=floor)
        refused = not all(self.resumes(s, self.of(s).end) for s in chosen)
        fails = self.random.random() < 0.1
        inputs = mx.array(rows)[:, :, None]

        def call() -> None:
            with self.cache.forward(batch):
                for index, child in enumerate(self.children):
                    if child is not self.cache:
                        self.cache.set_layer_type(index)
                    for layer in LAYERS:
                        if child is self.recurrent:
                            for row, s in enumerate(counts):
                                begin = self.of(s).end
                                self.put(
                                    layer, s, after[s], begin, inputs if gives[s] else None, row, follows[s]
                                )
                        else:
                            keys = mx.array(batch.positions, mx.float32)[None, None, :, None]
                            self.cache.layer(layer).put(keys, -keys)
                        if fails:
                            raise Planted

        goes_back = {s: [p for p in range(self.of(s).end + 1) if self.is_kept(s, p)] for s in chosen}
        if self.attempt(call, after, refused):
            for s in chosen:
                for position in goes_back[s]:
                    if position >= self.of(s).floor:
                        assert self.recurrent.can_resume(s, position), (s, position)

    def is_kept(self, sequence: int, position: int) -> bool:
        """Whether it must be possible to go back there as long as the position is among the newest."""
        noted, stream = self.of(sequence).noted, self.recurrent._streams.get(sequence)
        if stream and position == stream.end and not stream.keeps_newest:
            return False
        return self.recurrent.can_resume(sequence, position) and any(
            noted[max(0, position - 1) : position + 1]
        )

    def put(
        self, layer: int, s: int, after: Stream, begin: int, inputs: mx.array | None, row: int, follows: bool
    ) -> None:
        handle, n = self.recurrent.layer(layer), after.end - begin
        wanted = self.recurrent.wanted(s)
        assert {mark for mark in after.marks if begin < mark < after.end} <= {*wanted}
        for at in (*(wanted if follows else ()), None):
            (read,) = after.read[at or after.end]
            state = state_of(layer, fold(layer, 0, read))
            if at is None and inputs is not None:
                m = n if n <= self.recurrent._rewind or not follows else max(1, self.recurrent._rewind)
                own = inputs[:, -m:]
                handle.put(*state, sequence=s, inputs=(own, own * 2), row=row)
            else:
                handle.put(*state, sequence=s, at=at)

    def remove(self) -> None:
        sequence = self.random.choice(SEQUENCES)
        stream = self.of(sequence)
        begin = self.random.randint(max(0, stream.end - 12), stream.end)
        end = None if self.random.random() < 0.5 else begin + self.random.randint(0, 4)
        stop = stream.end if end is None else min(end, stream.end)
        mode: Any = self.random.choice(["refuse", "keep", "replay"])
        after, gap = stream, stop - begin
        refused: bool | None = False
        floor = stream.floor if stream.floor <= begin else max(begin + 1, stream.floor - gap)
        read, noted = (
            stream.read[: begin + 1] + stream.read[stop + 1 :],
            stream.noted[:begin] + stream.noted[stop:],
        )
        marks = frozenset(
            mark if mark <= begin else mark - gap for mark in stream.marks if not begin < mark < stop
        )
        if not stream.end and end != 0:
            after = Stream()
        elif begin < stop == stream.end:
            after, refused = stream.cut(begin), not self.resumes(sequence, begin)
        elif begin < stop and mode == "refuse":
            refused = True
        elif begin < stop and mode == "keep":
            seams = {seam for seam in stream.seams if seam < begin} | {begin}
            seams |= {seam - gap for seam in stream.seams if seam > stop}
            held = self.recurrent._streams[sequence]
            if begin and self.resumes(sequence, stop):
                read = (
                    *stream.read[:begin],
                    stream.read[begin] | stream.read[stop],
                    *stream.read[stop + 1 :],
                )
            else:
                # Inputs before the next checkpoint are of no use.
                first = min((p for p in held.checkpoints if p >= stop and p > gap), default=stream.end)
                noted = stream.noted[:begin] + (False,) * (first - stop) + stream.noted[first:]
                seams.add(first - gap)
            after = Stream(read, noted, frozenset(seams), marks, floor)
        elif begin < stop:
            known = stream.known(stop, stream.end) and self.resumes(sequence, begin)
            # Inputs before the floor may have been dropped.
            refused = None if known and stop < stream.floor else not known
            if known:
                reads = list(stream.read[: begin + 1])
                seams = {seam for seam in stream.seams if seam < begin}
                for token in min(stream.read[-1], key=len)[stop - stream.end :]:
                    reads.append(frozenset({(*read, token) for read in reads[-1]}))
                after = Stream(tuple(reads), noted, frozenset(seams), marks, floor)
        before = len(self.replays)
        done = self.attempt(
            lambda: self.cache.remove(sequence, begin, end, recurrent=mode), {sequence: after}, refused
        )
        if done and begin < stop < stream.end and mode == "replay":
            assert self.replays[before:] == list(LAYERS)
        if done and begin < stop == stream.end:
            self.settle(sequence)

    def settle(self, sequence: int) -> None:
        """Where two answers were right, the state that was chosen is the one from now on."""
        stream = self.of(sequence)
        if len(stream.read[-1]) > 1:
            number = number_in(self.recurrent.newest(0, sequence))
            (read,) = (read for read in stream.read[-1] if fold(0, 0, read) == number)
            self.streams[sequence] = replace(stream, read=(*stream.read[:-1], frozenset({read})))

    def copy_prefix(self) -> None:
        src, dst = self.random.sample(SEQUENCES, 2)
        end = self.of(src).end
        length = self.random.randint(max(0, end - 9), end + 1)
        copied = self.of(src).cut(min(length, end)) if length else Stream()
        done = self.attempt(lambda: self.cache.copy_prefix(src, dst, length), {dst: copied}, False)
        if done and self.recurrent.can_resume(dst, self.of(dst).end):
            self.settle(dst)

    def restore(self) -> None:
        src, dst = self.random.sample(SEQUENCES, 2)
        plan = self.cache._plan_restore(dst, self.cache._snapshot(src))
        self.attempt(plan.commit, {dst: self.of(src)}, False)

    def mark(self) -> None:
        sequence = self.random.choice(SEQUENCES)
        stream = self.of(sequence)
        position = max(0, stream.end + self.random.randint(-9, 6))
        most = self.recurrent._max_checkpoints
        kept = sorted({*stream.marks, position})[-most:] if most else []
        is_possible = position in kept and (position > stream.end or self.resumes(sequence, position))
        result: list[bool] = []
        call = lambda: result.append(self.recurrent.mark(sequence, position))  # noqa: E731
        after = {sequence: replace(stream, marks=frozenset(kept))} if position and is_possible else {}
        done = self.attempt(call, after, False)
        if result and not position:
            assert result == [True]
        elif result and result[0]:
            assert is_possible
            assert position >= stream.end or position in self.recurrent._streams[sequence].states
        elif result and done and after:
            # There was no room.
            assert position < stream.end
            self.streams[sequence] = stream

    def attempt(self, call: Callable[[], object], after: dict[int, Stream], refused: bool | None) -> bool:
        """Make a call that is refused, or interrupted, or changes these streams; return whether it did.

        It may be either if `refused` is None.
        """
        records = dict(self.recurrent._streams)
        ends = {s: [child.end(s) for child in self.children] for s in SEQUENCES}
        self.breaks = self.random.random() < 0.1
        done = False
        try:
            if self.random.random() < FAULTS:
                with Tracer(int(self.random.expovariate(1 / 80))):
                    call()
            else:
                call()
        except NotSupportedError:
            assert refused is not False
        except (Planted, Broken):
            done = any(self.recurrent._streams.get(s) is not records.get(s) for s in after)
        else:
            assert not refused
            done = True
        finally:
            self.breaks = False
        if not done:
            assert self.recurrent._streams.keys() == records.keys()
            assert all(self.recurrent._streams[s] is record for s, record in records.items())
            assert ends == {s: [child.end(s) for child in self.children] for s in SEQUENCES}
            return False
        for sequence, stream in after.items():
            self.streams.pop(sequence, None)
            if stream.end or stream.marks:
                self.streams[sequence] = stream
        return True

    def check(self) -> None:
        for child in self.children:
            child.check()
        for sequence in SEQUENCES:
            self.check_sequence(sequence, self.of(sequence))

    def check_sequence(self, sequence: int, stream: Stream) -> None:
        cache = self.recurrent
        assert [child.end(sequence) for child in self.children] == [stream.end] * len(self.children)
        held = cache._streams.get(sequence)
        assert frozenset(held.marks if held else ()) == stream.marks
        for position, state in (held.states if held else {}).items():
            for layer, own in state.items():
                right = {fold(layer, 0, read) + layer for read in stream.read[position]}
                assert number_in(own) in right, (sequence, position)
        first = max(0, stream.end - 25)
        resumable = [p for p in range(first, -1, -1) if cache.can_resume(sequence, p)][:1]
        for position in range(first, stream.end + 2):
            can, possible = cache.can_resume(sequence, position), self.possible(sequence, position)
            assert can <= possible
            # What was just old enough before the last tokens were removed may have been dropped.
            least = stream.floor + (stream.floor > stream.end - cache._rewind)
            assert can == possible or position < least, (sequence, position)
            if can:
                resumable.append(position)
            if held and stream.end:
                assert cache.prepare_restore(sequence, position) == resumable[-1]


def unused(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
    raise AssertionError("a world has its own")


MAKERS: dict[str, Callable[[], Any]] = {
    "some checkpoints": lambda: RecurrentCache(4, 5, replay=unused, rewind=6),
    "as few as possible": lambda: RecurrentCache(4, 0, replay=unused, rewind=3),
    "few bytes": lambda: RecurrentCache(3, 9, max_bytes=30, replay=unused, rewind=8),
    "a budget": lambda: RecurrentCache(2, 8, replay=unused, rewind=5, budget=60),
    "no rewind": lambda: RecurrentCache(3, 4, replay=unused),
    "with attention": lambda: WrapperCache(
        CausalCache(add_offsets), RecurrentCache(4, 3, replay=unused, rewind=7)
    ),
}


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_goes_back_to_every_newest_token(make: Callable[[], Any], seed: int) -> None:
    world = World(make(), Random(seed))
    calls = [world.forward, world.remove, world.copy_prefix, world.restore, world.mark]
    for _ in range(STEPS):
        world.random.choices(calls, [12, 6, 3, 1, 2])[0]()
        world.check()
    assert world.replays or not world.recurrent._rewind
