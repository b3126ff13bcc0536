"""The calls of every kind: their order, their errors, and that they evaluate nothing."""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    Cache,
    CacheConfig,
    CacheError,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    SlidingWindowCache,
    slide,
)
from mlx_kvcache.caches.base import KeyValueCache
from mlx_kvcache.caches.causal import Shift
from mlx_kvcache.cells.visibility import Window
from mlx_kvcache.quantization import Codec
from mlx_kvcache.storage.buffers import Pair
from tests.caches.data import causal, coded, column, fed, refused
from tests.kinds import SINGLE_KINDS, Kind, add_offsets


@pytest.fixture(params=SINGLE_KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def unwrapped(kind: Kind, shift: Shift | None) -> KeyValueCache:
    made = kind.make(shift)
    assert isinstance(made, KeyValueCache)
    return made


@pytest.fixture
def cache(kind: Kind) -> KeyValueCache:
    made = unwrapped(kind, add_offsets)
    made.init(mx.float32, max_sequences=2, capacity=16, max_batch=12)
    return made


def held(cache: Any) -> dict[int, tuple[int, list[int]]]:
    """Each sequence's end and the positions that are held of it, wherever they lie."""
    return {
        name: (end, [p for span in spans for p in range(span.position, span.end)])
        for name, (end, spans) in cache._table.sequences.items()
    }


def test_is_a_cache(cache: KeyValueCache) -> None:
    assert isinstance(cache, Cache)


def test_calls_out_of_order(kind: Kind) -> None:
    cache = unwrapped(kind, None)
    kv = coded([0])
    for call in (
        lambda: cache.start_forward(Batch([0], [0])),
        lambda: cache.put(*kv),
        lambda: cache.get(),
        lambda: cache.layer(0).put(*kv),
        lambda: cache.set_layer(0),
        lambda: cache.set_causal(CausalOptions()),
        lambda: cache.remove(0, 0),
        lambda: cache.copy_prefix(0, 1, 1),
        lambda: cache.can_resume(0, 0),
        lambda: cache.end(0),
    ):
        refused(cache, call, CacheError, "init must come first")
    cache.init(mx.float32)
    refused(cache, lambda: cache.init(), CacheError, "init was called before")
    refused(cache, lambda: cache.set_config(CacheConfig()), CacheError, "before init")
    refused(cache, lambda: cache.put(*kv), CacheError, "start_forward must come first")
    refused(cache, lambda: cache.get(), CacheError, "start_forward must come first")
    refused(cache, lambda: cache.set_causal(CausalOptions()), CacheError, "start_forward must come first")
    cache.start_forward(Batch([0], [0]))
    refused(cache, lambda: cache.get(), CacheError, "layer 0 has had no put")
    cache.put(*kv)
    refused(cache, lambda: cache.layer(3).get(), CacheError, "layer 3 has had no put")
    cache.get()
    cache.start_forward(Batch([1], [0]))
    refused(cache, lambda: cache.get(), CacheError, "layer 0 has had no put in this batch")


def test_after_close(cache: KeyValueCache) -> None:
    fed(cache, [0, 1])
    with cache as entered:
        assert entered is cache
    cache.close()
    for call in (lambda: cache.end(0), lambda: cache.put(*coded([0])), lambda: cache.init()):
        with pytest.raises(CacheError, match="closed"):
            call()
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    ("positions", "sequences", "multimodal", "message"),
    [
        ([], [], [], "at least 1 token"),
        ([0, 1], [0], [], "a sequence per position, got 2 and 1"),
        ([0, -1], [0, 0], [], r"positions\[1\] is -1"),
        ([0], [-3], [], r"sequences\[0\] is -3"),
        ([4, 4], [2, 2], [], "position 4 of sequence 2 twice"),
        ([0], [0], [1], "multimodal index 1 is out of range for a batch of 1"),
    ],
)
def test_batches_that_cannot_be(
    positions: list[int], sequences: list[int], multimodal: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(positions, sequences, multimodal)


def test_positions_must_go_on(cache: KeyValueCache) -> None:
    fed(cache, [0, 1, 2])
    for positions, said in (([4], "got 4 to 4"), ([2], "got 2 to 2"), ([3, 5], "got 3 to 5")):
        batch = Batch(positions, [0] * len(positions))
        refused(cache, partial(cache.start_forward, batch), ValueError, f"sequence 0 ends at 3.*{said}")
    refused(cache, lambda: cache.start_forward(Batch.run(0, 3, 13)), ValueError, "13 tokens .*max_batch=12")
    with pytest.raises(ValueError, match="got 0 tokens"):
        Batch.run(0, 3, 0)


def test_numbers_out_of_range(cache: KeyValueCache) -> None:
    fed(cache, range(4))
    for call, said in (
        (lambda: cache.remove(0, -1), "begin must be 0 or more, got -1"),
        (lambda: cache.remove(0, 3, 2), r"\[3, 2\)"),
        (lambda: cache.remove(-1, 0), "sequence must be 0 or more"),
        (lambda: cache.copy_prefix(0, 0, 2), "onto itself"),
        (lambda: cache.copy_prefix(0, 1, -2), "length must be"),
        (lambda: cache.can_resume(0, -1), "position must be"),
        (lambda: cache.set_layer(-1), "layer must be 0 or more, got -1"),
        (lambda: cache.layer(-2), "layer must be 0 or more, got -2"),
        (lambda: slide(cache, 0, keep=-1), "keep must be"),
    ):
        refused(cache, call, ValueError, said)
    cache.start_forward(Batch([4], [0]))
    refused(
        cache,
        lambda: cache.set_causal(CausalOptions((1,))),
        ValueError,
        "index 1 is out of range for a batch of 1",
    )


def test_kinds_out_of_range() -> None:
    for make, told in (
        (lambda: SlidingWindowCache(0), "window_size must be 1 or more, got 0"),
        (lambda: SlidingWindowCache(4, sinks=4), "sinks must be 0 to 3 in a window of 4 tokens, got 4"),
        (lambda: SlidingWindowCache(4, sinks=5), "sinks must be 0 to 3 in a window of 4 tokens, got 5"),
        (lambda: SlidingWindowCache(4, sinks=-1), "sinks must be 0 or more, got -1"),
        (lambda: SlidingWindowCache(4, rewind=-1), "rewind must be 0 or more, got -1"),
        (lambda: ChunkedAttentionCache(0), "chunk_size must be 1 or more, got 0"),
        (lambda: ChunkedAttentionCache(4, rewind=-1), "rewind must be 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=told):
            make()
    assert SlidingWindowCache(4, rewind=0, sinks=3)._rule == Window(4, 3)
    assert [make(4)._rewind for make in (SlidingWindowCache, ChunkedAttentionCache)] == [1, 1]
    ChunkedAttentionCache(1, rewind=0)
    with pytest.raises(ValueError, match="head_dim must be 1 or more, got 0"):
        CausalCache().init(head_dim=0)


@pytest.mark.parametrize("size", [2**31 + 5, 2**63, sys.maxsize])
def test_sizes_beyond_all_positions(size: int) -> None:
    """Masks are arrays where queries see later tokens."""
    for cache in (SlidingWindowCache(size), ChunkedAttentionCache(size)):
        cache.init(mx.float32)
        cache.start_forward(Batch.run(0, 0, 3))
        cache.set_causal(CausalOptions([1]))
        cache.put(*coded(range(3)))
        mask = cache.get()[2]
        assert isinstance(mask, mx.array)
        assert mask.tolist() == [[True, False, False], [True] * 3, [True] * 3]


@pytest.mark.parametrize("options", [{"max_sequences": 0}, {"capacity": -1}, {"max_batch": 0}])
def test_init_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        CausalCache().init(**options)
    with pytest.raises(ValueError, match="float"):
        CausalCache().init(mx.int32)


def test_check_finds_what_cannot_be() -> None:
    """Arrays that the table knows nothing of, and such as are stored otherwise than it says."""
    cache = causal()
    fed(cache, [0, 1])
    cache.check()
    form, pairs = cache._store.layers[0].form, cache._store.layers[0].pairs
    [(segment, pair)] = pairs.items()
    quantized = form._replace(heads=1, key_dim=32, value_dim=32, key_codec=Codec(8, 32))
    packed = Pair(quantized, *quantized.zeros(pair.capacity, is_packed=True))
    for wrong in ({segment: pair, segment + 1: pair}, {segment: packed}):
        pairs.clear()
        pairs.update(wrong)
        with pytest.raises(AssertionError):
            cache.check()


def test_arrays_that_do_not_fit(cache: KeyValueCache) -> None:
    fed(cache, [0, 1])
    keys, values = coded([2, 3])
    cache.start_forward(Batch([2, 3], [0, 0]))
    for bad_keys, bad_values in (
        (keys[:, :, :1], values),
        (keys, values[:, :, :1]),
        (mx.repeat(keys, 2, axis=1), values),
        (mx.repeat(keys, 2, axis=0), values),
        (keys[..., :1], values),
        (keys, values[..., :1]),
        (keys[0], values[0]),
    ):
        with pytest.raises(ValueError, match=r"expected \(1, 1, 2, 2\) and \(1, 1, 2, 3\)"):
            cache.put(bad_keys, bad_values)
    with pytest.raises(ValueError, match=r"int32, expected floats"):
        cache.put(keys.astype(mx.int32), values)
    with pytest.raises(ValueError, match=r"int32, expected floats"):
        cache.layer(1).put(keys.astype(mx.int32), values)
    cache.put(keys.astype(mx.float16), values)
    assert cache.get()[0].dtype == mx.float32


def test_an_exception_takes_the_batch_out_again(cache: KeyValueCache) -> None:
    fed(cache, range(4))
    before = held(cache)
    with pytest.raises(KeyError), cache.forward(Batch([4, 0], [0, 9])):
        cache.put(*coded([4, 0]))
        raise KeyError
    assert held(cache) == before
    with pytest.raises(CacheError, match="start_forward"):
        cache.get()
    fed(cache, [4])


def test_what_an_exception_takes_out_binds_no_form() -> None:
    cache = causal()
    with pytest.raises(KeyError), cache.forward(Batch([0], [0])):
        cache.put(*coded([0], heads=3))
        raise KeyError
    with cache.forward(Batch([0], [0])):
        cache.put(*coded([0], heads=2))
    assert cache.get()[0].shape == (1, 2, 1, 2)


def test_later_tokens_until_the_next_forward() -> None:
    cache = causal()
    cache.start_forward(Batch.run(0, 0, 4))
    cache.put(*coded(range(4)))
    assert cache.get()[2] == "causal"
    cache.set_causal(CausalOptions((1, 2)))
    mask = cache.get()[2]
    assert isinstance(mask, mx.array)
    assert mask.tolist() == [[True, False, False, False], [True] * 4, [True] * 4, [True] * 4]
    assert fed(cache, [4, 5])[2] == "causal"


def test_additive_masks_and_padding() -> None:
    cache = causal(config=CacheConfig(mask_dtype=mx.float16, padding=4))
    keys, values, mask = fed(cache, range(3))
    assert isinstance(mask, mx.array)
    assert mask.dtype == mx.float16
    hidden = -float("inf")
    assert mask.tolist() == [[0, hidden, hidden, hidden], [0, 0, hidden, hidden], [0, 0, 0, hidden]]
    assert column(keys) == [0, 1, 2, 0]
    assert values.shape == (1, 1, 4, 3)
    boolean = causal(config=CacheConfig(padding=4))
    mask = fed(boolean, range(3))[2]
    assert isinstance(mask, mx.array)
    assert mask[0].tolist() == [True, False, False, False]
    assert fed(boolean, [3])[2] is None
    for bad in ({"padding": 0}, {"mask_dtype": mx.int32}):
        with pytest.raises(ValueError, match="must be"):
            CacheConfig(**bad)


def test_padding_is_a_plain_number() -> None:
    """One of eight bits would overflow."""
    config = CacheConfig(padding=np.uint8(4))
    assert (config.padding, type(config.padding)) == (4, int)
    with pytest.raises(ValueError, match="padding must be 1 or more, got 0"):
        CacheConfig(padding=0)
    assert CacheConfig(padding=2**31 - 1).padding == 2**31 - 1
    with pytest.raises(ValueError, match="padding must be 2147483647 or less, got 2147483648"):
        CacheConfig(padding=2**31)


def test_padding_hides_what_was_not_a_number() -> None:
    """Cells that a removed token filled with NaN must not come back as padding."""
    cache = causal(config=CacheConfig(padding=8))
    fed(cache, range(2))
    cache.start_forward(Batch([2], [0]))
    cache.put(*(kv * mx.nan for kv in coded([2])))
    cache.remove(0, 2)
    keys, values, _ = fed(cache, [2])
    assert mx.isfinite(keys).all().item()
    assert mx.isfinite(values).all().item()


def test_nothing_is_evaluated(cache: KeyValueCache) -> None:
    """Inputs of some MB each, and no memory taken for them or for anything made of them."""
    heads = 1 << 16

    def lazy(dim: int) -> mx.array:
        return mx.random.normal((1, heads, 4, dim), key=mx.random.key(dim))

    gc.collect()
    before = mx.get_active_memory()
    cache.start_forward(Batch.run(0, 0, 4))
    cache.put(lazy(4), lazy(8))
    outputs = list(cache.get()[:2])
    cache.copy_prefix(0, 1, 3)
    for sequence in (0, 1):
        cache.remove(sequence, 3)
    if cache.can_resume(0, 2):
        cache.remove(0, 1, 2)
    # A few start indices are made at once.
    assert mx.get_active_memory() - before < 4096
    mx.eval(outputs)
    assert mx.get_active_memory() - before > heads * 4 * 12 * 4 - 1


def test_importing_the_core_does_not_import_mlx_lm() -> None:
    import subprocess

    code = "import sys, mlx_kvcache; assert not any(m.startswith('mlx_lm') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
