"""The core's constructors and calls, with arguments that nobody meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from hypothesis import strategies as st

from mlx_kvcache import (
    Batch,
    CacheConfig,
    CacheError,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    EncoderCache,
    Quantization,
    RecurrentCache,
    SlidingWindowCache,
    WrapperCache,
    attention,
    slide,
)
from mlx_kvcache.cells.spans import union
from mlx_kvcache.persist import load, save
from tests.kinds import add_offsets

from .bounds import folder
from .damage import often
from .sequences import state_of
from .target import drawn

small = st.integers(-1, 9) | st.integers(0, 4)
large = st.sampled_from((64, 300, 10**6, 2**31, 2**63, 2**70))
odd: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.floats() | st.text(max_size=2) | st.lists(small, max_size=2)
)
number = often(small, large | odd)
numbers = often(st.lists(small, max_size=4), st.lists(number, max_size=3) | odd)
dtypes = st.sampled_from((mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.bool_, mx.complex64))
floats = st.sampled_from((None, mx.float32, mx.float16))
sizes = st.sampled_from((1, 1, 2, 3, 0, 32))


class Made(NamedTuple):
    """A cache's arguments and options."""

    kind: str
    a: Any
    b: Any
    c: Any
    config: tuple[Any, Any] | None
    init: dict[str, Any]
    quantization: tuple[Any, Any, Any] | None


class Call(NamedTuple):
    """Something that is done with it."""

    name: str
    a: Any
    b: Any
    c: Any
    shape: tuple[int, int, int, int]
    dtype: mx.Dtype


class Programme(NamedTuple):
    """A cache, and what is done with it."""

    made: Made
    calls: list[Call]


def _new(made: Made) -> Any:
    """A cache as it is asked for; raises what the constructors do."""
    kinds: dict[str, Callable[[], Any]] = {
        "causal": lambda: CausalCache(add_offsets),
        "window": lambda: SlidingWindowCache(made.a, made.b, made.c, add_offsets),
        "chunk": lambda: ChunkedAttentionCache(made.a, made.b, add_offsets),
        "encoder": EncoderCache,
        "recurrent": lambda: RecurrentCache(made.a, made.b, made.c),
        "wrapper": lambda: WrapperCache(
            EncoderCache(), SlidingWindowCache(made.a, made.b, shift=add_offsets), CausalCache(add_offsets)
        ),
    }
    cache = kinds[made.kind]()
    if made.config:
        cache.set_config(CacheConfig(*made.config))
    quantization = Quantization(*made.quantization) if made.quantization else None
    cache.init(quantization=quantization, **made.init)
    return cache


def forward(cache: Any, call: Call) -> None:
    """Some tokens that go on where their sequence ends, or some others."""
    if isinstance(call.a, int) and isinstance(call.b, int) and 0 <= call.a < 9 and 0 < call.b < 40:
        batch = Batch.run(call.a, cache.end(call.a), call.b)
    else:
        batch = Batch(call.b, call.a, call.c)
    with cache.forward(batch):
        _fill(cache, call, len(batch))


def _fill(cache: Any, call: Call, n: int) -> None:
    _, heads, _, dim = call.shape
    for index, child in enumerate(getattr(cache, "_children", [cache])):
        if child is not cache:
            cache.set_layer_type(index)
        handle = cache.layer(0)
        if isinstance(child, RecurrentCache):
            handle.put(mx.ones((2,)), None)
            handle.get()
            continue
        new = mx.ones((1, heads, n, dim), call.dtype)
        handle.put(new, new)
        keys, values, mask = handle.get()
        _evaluate(keys, values)
        assert keys.shape[2] == values.shape[2] >= n
        if isinstance(mask, mx.array):
            assert mask.shape == (n, keys.shape[2])


def _evaluate(*arrays: mx.array) -> None:
    """Compute them, unless the padding that was asked for makes them larger than memory should be."""
    if sum(array.nbytes for array in arrays) <= 64 << 20:
        mx.eval(arrays)


def run(cache: Any, call: Call) -> None:
    begin = cache.end(call.a) if call.shape[1] == 1 else call.b
    cache.start_forward(Batch.run(call.a, begin, call.c), reserve=call.shape[0] == 2)


def put(cache: Any, call: Call) -> None:
    if isinstance(cache, RecurrentCache):
        cache.put(mx.zeros(call.shape, call.dtype), None, sequence=call.a, at=call.b)
    else:
        cache.put(mx.zeros(call.shape, call.dtype), mx.zeros(call.shape[::-1], call.dtype))


def same(cache: Any, call: Call) -> None:
    new = mx.zeros(call.shape, call.dtype)
    cache.layer(call.a).put(new, new)


def get(cache: Any, call: Call) -> None:
    cache.set_layer(call.a)
    _evaluate(*(array for array in cache.get() if isinstance(array, mx.array)))


def attend(cache: Any, call: Call) -> None:
    new = mx.zeros(call.shape, call.dtype)
    mx.eval(attention(new, new, new, cache, scale=1.0))


def causal(cache: Any, call: Call) -> None:
    cache.set_causal(CausalOptions(call.b))


def type_(cache: Any, call: Call) -> None:
    if isinstance(cache, WrapperCache):
        cache.set_layer_type(call.a)


def copy(cache: Any, call: Call) -> None:
    cache.copy_prefix(call.a, call.b, call.c)


def remove(cache: Any, call: Call) -> None:
    cache.remove(call.a, call.b, call.c)


def slid(cache: Any, call: Call) -> None:
    assert slide(cache, call.a, call.b, call.c) >= 0


def ask(cache: Any, call: Call) -> None:
    assert cache.can_resume(call.a, call.b) in (True, False)


def stored(cache: Any, call: Call) -> None:
    path = folder() / "stored.safetensors"
    save(path, cache, call.a if isinstance(call.a, int) else 0, None)
    load(path, cache, 3)


CALLS = (forward, forward, forward, forward, run, put, same, get, attend, causal, type_, copy, remove, slid)
BY_NAME = {own.__name__: own for own in (*CALLS, ask, stored)}

programmes = st.builds(
    Programme,
    st.builds(
        Made,
        st.sampled_from(("causal", "window", "chunk", "encoder", "recurrent", "wrapper")),
        number,
        number,
        often(small, odd),
        often(st.none() | st.just((mx.float16, 4)), st.tuples(st.none() | dtypes, number)),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": often(floats, dtypes),
                "max_sequences": often(st.integers(1, 3), number),
                "capacity": often(st.sampled_from((1, 8, 40)), number),
                "max_batch": often(st.sampled_from((8, 64)), number),
                "head_dim": often(st.none(), st.sampled_from((1, 32))),
            },
        ),
        often(
            st.none() | st.just((8, 32, 4)),
            st.tuples(often(st.sampled_from((8, (4, 8), None)), odd), st.just(32) | number, number),
        ),
    ),
    st.lists(
        st.builds(
            Call,
            st.sampled_from([own.__name__ for own in CALLS] + ["ask", "stored"]),
            often(small, numbers),
            often(small, numbers),
            often(small, numbers),
            st.tuples(sizes, sizes, sizes, sizes),
            often(st.just(mx.float32), dtypes),
        ),
        max_size=10,
    ),
)


def check_programme(programme: Programme) -> None:
    """Typed errors only, after which everything is as it was."""
    try:
        cache = _new(programme.made)
    except (ValueError, CacheError):
        return
    except TypeError:
        made = programme.made
        given = [*made.init.values(), *(made.quantization or ()), *(made.config or ())]
        given += {"causal": [], "encoder": [], "chunk": [made.a, made.b]}.get(made.kind, made[1:4])
        assert not all(isinstance(value, (int, mx.Dtype, tuple)) for value in given), programme.made
        return
    for call in programme.calls:
        before = state_of(cache)
        try:
            BY_NAME[call.name](cache, call)
        except (ValueError, CacheError):
            _check_same(cache, before, call)
        except TypeError:
            assert not _is_typed(call), call
            _check_same(cache, before, call)
        cache.check()
    cache.close()
    assert cache.nbytes == 0


def _is_typed(call: Call) -> bool:
    """Whether all arguments are of the types that they should be."""
    given = call.a, call.b, call.c
    if call.name in {"forward", "causal"}:
        return all(isinstance(own, list) and all(isinstance(one, int) for one in own) for own in given)
    return all(isinstance(value, int) for value in given)


def _check_same(cache: Any, before: list[Any], call: Call) -> None:
    """A cache is as it was. A forward may have moved cells, and begun layers, before it is taken back."""
    after = state_of(cache)
    if call.name in {"forward", "stored", "put", "same", "attend"}:
        after, before = [held(state) for state in after], [held(state) for state in before]
    assert after == before, call


def held(state: Any) -> Any:
    """What a table holds, wherever it lies; of anything else nothing."""
    if not isinstance(state, tuple):
        return None
    sequences, live, *_ = state
    positions = {s: (end, union((a.position, a.end) for a in spans)) for s, (end, spans) in sequences.items()}
    return positions, live


CORE = drawn("core", "the core's constructors and calls", programmes, check_programme)
