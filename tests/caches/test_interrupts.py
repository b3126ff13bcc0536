"""An exception at every line of every call, on every kind and store: all has happened, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CacheConfig,
    CacheError,
    CausalCache,
    CausalOptions,
    EncoderCache,
    Quantization,
    RecurrentCache,
    WrapperCache,
    attention,
    slide,
)
from mlx_kvcache.caches.interface import Recurrent
from mlx_kvcache.caches.recurrent import Arrays
from mlx_kvcache.cells.spans import clip
from tests.interrupts import Tracer, places
from tests.kinds import KINDS, STORES, add_offsets

NTH = int(os.environ.get("INTERRUPTS_NTH", "200"))
"""Of the lines of a call every so-manieth is tried; if not all are, each kind has only one store."""

ROOM = 36
SEQUENCES = range(4)
LAYERS = range(3)


class Subject:
    """A cache of some kind and store, as interruptions need it: made, filled and looked at."""

    def __init__(self, name: str, make: Callable[[], Any], quantization: Quantization | None) -> None:
        self.name = name
        self.make = make
        self.quantization = quantization
        self.dims = (32, 64) if quantization else (2, 3)

    def __str__(self) -> str:
        return self.name

    def leaves(self, cache: Any) -> list[Any]:
        return list(getattr(cache, "_children", [cache]))

    def init(self, cache: Any) -> None:
        cache.init(mx.float32, max_sequences=3, capacity=12, max_batch=16, quantization=self.quantization)

    def fed(self, cache: Any, tokens: dict[int, int], layers: range = range(2)) -> None:
        """So many tokens more of each sequence."""
        with cache.forward(self.batch(cache, tokens)):
            for layer in layers:
                self.put(cache, layer)

    def batch(self, cache: Any, tokens: dict[int, int]) -> Batch:
        pairs = [(cache.end(s) + i, s) for s, n in tokens.items() for i in range(n)]
        return Batch([p for p, _ in pairs], [s for _, s in pairs])

    def put(self, cache: Any, layer: int, plus: float = 0) -> None:
        """What belongs to the batch under way, in one layer of each child."""
        for index, leaf in enumerate(self.leaves(cache)):
            if cache is not leaf:
                cache.set_layer_type(index)
            step = leaf._pass.batch if hasattr(leaf, "_pass") else None
            if isinstance(leaf, RecurrentCache):
                assert step is not None
                for sequence, rows in step.rows.items():
                    state = mx.full((1, 2), float(cache.end(sequence)) + plus)
                    inputs = [mx.full((1, len(rows), 1), plus)]
                    cache.layer(layer).put(state, None, sequence=sequence, inputs=inputs)
            elif isinstance(leaf, EncoderCache):
                assert step is not None
                if len(step.rows) == 1:
                    entry = mx.full((1, 1, 2, 2), float(leaf.end(next(iter(step.rows)))) + plus)
                    cache.layer(layer).put(entry, -entry)
            else:
                n = leaf._step.n
                column = mx.arange(n, dtype=mx.float32)[None, None, :, None] + layer + plus
                cache.layer(layer).put(
                    *(
                        mx.broadcast_to(sign * column, (1, 1, n, d))
                        for sign, d in zip((1, -1), self.dims, strict=True)
                    )
                )

    def filled(self) -> Any:
        """With four sequences, one of them shared in part, windows that have slid, and little room."""
        cache = self.make()
        self.init(cache)
        self.fed(cache, {0: 6})
        self.fed(cache, {1: 3, 0: 1})
        cache.copy_prefix(0, 2, cache.end(0))
        self.fed(cache, {2: 2})
        self.fed(cache, {0: 1})
        cache.copy_prefix(1, 3, 3)
        self.fed(cache, {1: 1, 2: 1})
        return cache

    def seen(self, cache: Any) -> tuple[Any, Any]:
        """All that a caller can find out: what is held, and what the batch under way gives."""
        leaves = self.leaves(cache)
        for leaf in leaves:
            if not cache._closed:
                leaf.check()
        state = (cache._ready, cache._closed, cache._layer, getattr(cache, "_type", 0))
        if not cache._ready or cache._closed:
            return state, None
        ends = [cache.end(s) for s in SEQUENCES]
        resumable = [[cache.can_resume(s, p) for p in range(16)] for s in SEQUENCES]
        held = [[self.held(leaf, s) for s in SEQUENCES] for leaf in leaves]
        configs = [(leaf._config, leaf._layer) for leaf in leaves]
        step = [[self.read(leaf, layer) for layer in LAYERS] for leaf in leaves]
        return (state, ends, resumable, held, configs), step

    def held(self, leaf: Any, sequence: int) -> Any:
        """What is held of a sequence, less the batch under way, which is not there before it is put."""
        parts = {part.sequence: part for part in getattr(getattr(leaf, "_step", None), "parts", ())}
        snapshot = leaf._snapshot(sequence)
        if sequence not in parts:
            return plain(snapshot)
        begin = parts[sequence].begin
        cells = leaf._table[sequence].spans
        earlier = clip(cells, 0, begin)
        layers = {layer: buffers.read(earlier) for layer, buffers in leaf._store.layers.items()}
        return snapshot.end, plain(layers if earlier else {})

    def read(self, leaf: Any, layer: int) -> Any:
        try:
            if isinstance(leaf, RecurrentCache):
                return [plain(leaf._get(layer, s)) for s in leaf._under_way().batch.rows]
            return plain(leaf._get(layer))
        except CacheError as error:
            return type(error)


def plain(value: Any) -> Any:
    """Arrays as numbers, at any depth."""
    if isinstance(value, mx.array):
        numbers = np.array(value.astype(mx.float32))
        return numbers.shape, numbers.tobytes()
    if hasattr(value, "batch") and hasattr(value, "begins"):
        return None
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    return value


Before = Callable[[Subject, Any], Any] | None


class Call:
    """A call to interrupt, and what comes before it."""

    def __init__(
        self,
        name: str,
        call: Callable[[Subject, Any], Any],
        before: Before = None,
    ) -> None:
        self.name = name
        self.call = call
        self.before = before

    def __str__(self) -> str:
        return self.name


def with_layers(subject: Subject, cache: Any) -> None:
    """One more layer, of which sequence 0 has some tokens only."""
    cache.start_forward(subject.batch(cache, {0: 2}))
    for layer in LAYERS:
        subject.put(cache, layer)


def begun(subject: Subject, cache: Any) -> None:
    cache.start_forward(subject.batch(cache, {1: 2}))
    subject.put(cache, 0)


def put(layer: int, plus: float, subject: Subject, cache: Any) -> None:
    """One `put` on the last child, so that one call is interrupted."""
    leaf = subject.leaves(cache)[-1]
    shape = (1, 1, 2)
    if isinstance(leaf, RecurrentCache):
        leaf._put(layer, (mx.full((1, 2), plus), None), 1, None, [mx.full((1, 2, 1), plus)])
    else:
        leaf._put(layer, *(mx.full((*shape, d), plus) for d in subject.dims))


def chosen(subject: Subject, cache: Any) -> None:
    """A batch under way, and the last child as the current one."""
    begun(subject, cache)
    cache.set_layer(1)
    if len(subject.leaves(cache)) > 1:
        cache.set_layer_type(len(subject.leaves(cache)) - 1)


def attend(subject: Subject, cache: Any) -> None:
    if not isinstance(subject.leaves(cache)[-1], RecurrentCache):
        keys, values = (mx.ones((1, 1, 2, d)) for d in subject.dims)
        attention(mx.ones((1, 2, 2, subject.dims[0])), keys, values, cache, scale=1.0)


def removed(
    begin: int, end: int | None, subject: Subject, cache: Any, recurrent: Recurrent = "refuse"
) -> None:
    with suppress(CacheError):
        cache.remove(2, begin, end, recurrent)


def marked(subject: Subject, cache: Any) -> None:
    for leaf in subject.leaves(cache):
        if isinstance(leaf, RecurrentCache):
            leaf.mark(2, 7)


def slid(subject: Subject, cache: Any) -> None:
    with suppress(CacheError):
        slide(cache, 0, keep=1, discard=2)


def caused(subject: Subject, cache: Any) -> None:
    with suppress(CacheError):
        cache.set_causal(CausalOptions((0,)))


CALLS = [
    Call("start_forward of a token", lambda s, c: c.start_forward(s.batch(c, {0: 1}))),
    Call("start_forward of several", lambda s, c: c.start_forward(s.batch(c, {0: 2, 2: 1, 3: 3}))),
    Call("start_forward of a lot", lambda s, c: c.start_forward(s.batch(c, {1: 12}))),
    Call("start_forward to reserve", lambda s, c: c.start_forward(s.batch(c, {0: 2}), reserve=True)),
    Call("forward", lambda s, c: s.fed(c, {0: 1, 2: 2})),
    Call("set_causal", caused, begun),
    Call("set_layer", lambda s, c: c.set_layer(2)),
    Call("first put", partial(put, 1, 7.0), begun),
    Call("another put", partial(put, 0, 8.0), begun),
    Call("put of a new layer", partial(put, 2, 9.0), begun),
    Call("attention", attend, chosen),
    Call("get", lambda s, c: s.read(s.leaves(c)[-1], 0), begun),
    Call("copy_prefix", lambda s, c: c.copy_prefix(1, 0, 3)),
    Call("copy_prefix to a new one", lambda s, c: c.copy_prefix(0, 4, 8)),
    Call("can_resume", lambda s, c: c.can_resume(0, 3)),
    Call("remove a tail", partial(removed, 8, None)),
    Call("remove all", partial(removed, 0, None)),
    Call("remove from the middle", partial(removed, 5, 6)),
    Call("remove the head", partial(removed, 0, 3)),
    Call("remove and keep states", partial(removed, 7, 8, recurrent="keep")),
    Call("remove and replay", partial(removed, 7, 8, recurrent="replay")),
    Call("mark", marked),
    Call("slide", slid, with_layers),
    Call("restore", lambda s, c: c._plan_restore(3, c._snapshot(2)).commit()),
    Call("close", lambda s, c: c.close()),
]


def replayed(layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
    return mx.full((1, 2), float(layer + inputs[0].shape[1])), None


SUBJECTS = [
    Subject(f"{kind}, {store}", partial(kind.make, add_offsets), STORES[store])
    for number, kind in enumerate(KINDS)
    for store in (STORES if NTH == 1 else [[*STORES][number % len(STORES)]])
] + [
    Subject("encoder", EncoderCache, None),
    Subject("recurrent", lambda: RecurrentCache(1, 9), None),
    Subject("replay", lambda: RecurrentCache(3, 2, replay=replayed, rewind=4, budget=60), None),
    Subject("all", lambda: WrapperCache(EncoderCache(), RecurrentCache(1), CausalCache(add_offsets)), None),
]


def prepared(subject: Subject, before: Before) -> Any:
    cache = subject.filled()
    if before:
        before(subject, cache)
    return cache


@lru_cache(maxsize=8)
def seen_before(subject: Subject, before: Before) -> tuple[Any, Any]:
    """What is seen of a prepared cache; and, but for the chosen layer, once the batch under way is over."""
    cache = prepared(subject, before)
    seen = subject.seen(cache)
    for leaf in subject.leaves(cache):
        setattr(leaf, "_step" if hasattr(leaf, "_step") else "_pass", None)
    return seen, subject.seen(cache)[0][1:]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_all_or_nothing(subject: Subject, call: Call) -> None:
    before, forgotten = seen_before(subject, call.before)
    whole = prepared(subject, call.before)
    chosen = places(partial(call.call, subject, whole), NTH, SUBJECTS.index(subject))
    after = subject.seen(whole)
    for at in chosen:
        cache = prepared(subject, call.before)
        tracer = Tracer(at)
        assert tracer.run(partial(call.call, subject, cache))
        place = tracer.places[at]
        seen = subject.seen(cache)
        is_nothing = seen == before or (call.name == "forward" and seen[0][1:] == forgotten)
        assert is_nothing or seen == after, place
        if seen != after or cache._closed:
            call.call(subject, cache)
            assert subject.seen(cache) == after, place
        assert cache.nbytes == 0 or not cache._closed


def configured(cache: Any) -> None:
    cache.set_config(CacheConfig(padding=4))


def test_init_and_config_are_made_whole_or_not() -> None:
    for subject in SUBJECTS:
        for call in (subject.init, configured):
            before, whole = subject.make(), subject.make()
            call(whole)
            counted = subject.make()
            for at in places(partial(call, counted)):
                cache = subject.make()
                assert Tracer(at).run(partial(call, cache))
                seen = subject.seen(cache)
                assert seen in (subject.seen(before), subject.seen(whole))
                if seen == subject.seen(before):
                    call(cache)
                if not cache._ready:
                    subject.init(cache)
                subject.fed(cache, {0: 3})
