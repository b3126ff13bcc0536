"""Sequences of every kind and store as files: what is loaded answers as what was saved."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CacheError,
    CacheFileError,
    CacheFullError,
    CausalCache,
    EncoderCache,
    Quantization,
    RecurrentCache,
    SlidingWindowCache,
    WrapperCache,
)
from mlx_kvcache.persist import load, save
from mlx_kvcache.persist.container import read_arrays, read_contents, write
from tests.kinds import KINDS, STORES, Kind, add_offsets

from .samples import Change

DIMS = (32, 64)


def made(kind: Kind, store: str, room: int = 200) -> Any:
    cache = kind.make(add_offsets)
    cache.init(mx.float32, capacity=room, max_batch=64, quantization=STORES[store])
    return cache


def children(cache: Any) -> list[Any]:
    return list(getattr(cache, "_children", [cache]))


def feed(cache: Any, n: int, sequence: int = 0) -> list[tuple[mx.array, mx.array]]:
    """The next n tokens, coded by position, in two layers of each child; what each returns last."""
    begin, found = cache.end(sequence), []
    column = mx.arange(begin, begin + n, dtype=mx.float32)[None, None, :, None]
    with cache.forward(Batch.run(sequence, begin, n)):
        for index in range(len(children(cache))):
            if len(children(cache)) > 1:
                cache.set_layer_type(index)
            for layer in range(2):
                handle = cache.layer(layer)
                handle.put(
                    mx.broadcast_to(column, (1, 1, n, DIMS[0])), mx.broadcast_to(-column, (1, 1, n, DIMS[1]))
                )
                found.append(handle.get()[:2])
    return found


def filled(cache: Any) -> Any:
    """A sequence in several runs, beside another one."""
    feed(cache, 15)
    cache.copy_prefix(0, 1, 15)
    for n in (3, 1, 1):
        feed(cache, n)
    feed(cache, 2, sequence=1)
    return cache


def assert_same(one: Any, other: Any, sequences: tuple[int, int] = (0, 0)) -> None:
    """Both go on, and back, in the same way."""
    assert one.end(sequences[0]) == other.end(sequences[1])
    for position in range(one.end(sequences[0]) + 2):
        assert one.can_resume(sequences[0], position) == other.can_resume(sequences[1], position), position
    for ours, theirs in zip(feed(one, 2, sequences[0]), feed(other, 2, sequences[1]), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert mx.array_equal(a, b)
    for cache in (one, other):
        cache.check()


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "lazy"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_loaded_goes_on_as_what_was_saved(
    kind: Kind, store: str, verify: bool, tmp_path: Path
) -> None:
    path, tokens = tmp_path / "a.safetensors", list(range(20))
    cache, other = filled(made(kind, store)), filled(made(kind, store, room=300))
    size = save(path, cache, 0, tokens)
    assert path.stat().st_size == size
    opened = load(path, other, 7, verify=verify)
    assert (opened.tokens, opened.end, opened.is_verified) == (tokens, 20, verify)
    assert_same(cache, other, (0, 7))
    # Over what is there, which goes.
    load(path, other, 0, verify=verify)
    another = made(kind, store)
    load(path, another, 1, verify=verify)
    assert_same(other, another, (0, 1))


@pytest.mark.parametrize("target", STORES)
@pytest.mark.parametrize("source", STORES)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[-1]], ids=str)
def test_into_another_store(kind: Kind, source: str, target: str, tmp_path: Path) -> None:
    """Positions are exact in any number of bits."""
    cache, other = filled(made(kind, source)), made(kind, target)
    save(tmp_path / "a", cache, 0)
    load(tmp_path / "a", other, 0)
    assert_same(cache, other)
    again = made(kind, source)
    save(tmp_path / "a", other, 0)
    load(tmp_path / "a", again, 3)
    assert_same(other, again, (0, 3))


@pytest.mark.parametrize("sequence", [-1, "x", 1.5, None])
def test_a_sequence_is_a_whole_number(sequence: Any, tmp_path: Path) -> None:
    cache = CausalCache()
    cache.init(mx.float32)
    path = tmp_path / "file"
    save(path, cache, 0)
    for call in (save, load):
        with pytest.raises((TypeError, ValueError), match="sequence must be"):
            call(path, cache, sequence)
    assert not cache._table.sequences


def test_only_live_tokens_are_written(tmp_path: Path) -> None:
    cache = SlidingWindowCache(16, rewind=4)
    cache.init(mx.float16, capacity=2000, max_batch=500)
    kv = mx.zeros((1, 2, 500, 64), mx.float16)
    with cache.forward(Batch.run(0, 0, 500)):
        cache.put(kv, kv)
    assert save(tmp_path / "a", cache, 0) < 19 * 2 * 2 * 64 * 2 + 1500
    assert cache.nbytes > 19 * 2 * 2 * 64 * 2


def test_an_empty_sequence(tmp_path: Path) -> None:
    cache, other = CausalCache(), CausalCache()
    for each in (cache, other):
        each.init()
    save(tmp_path / "a", cache, 5)
    load(tmp_path / "a", other, 2)
    assert other.end(2) == 0


def test_encoders_and_recurrences(tmp_path: Path) -> None:
    def wrapped() -> WrapperCache:
        cache = WrapperCache(EncoderCache(), RecurrentCache(interval=2))
        cache.init(mx.float32)
        return cache

    cache, other = wrapped(), wrapped()
    image, state = mx.random.normal((2, 5, 7)).astype(mx.bfloat16), mx.random.normal((1, 3))
    for step in range(5):
        with cache.forward(Batch([step], [0])):
            if step == 1:
                cache.layer(3).put(image, image + 1)
            cache.set_layer_type(1)
            cache.layer(0).put(state + step, None)
            cache.layer(1).put(state)
    save(tmp_path / "a", cache, 0)
    load(tmp_path / "a", other, 4)
    assert other.end(4) == 5
    assert [other.can_resume(4, p) for p in range(6)] == [cache.can_resume(0, p) for p in range(6)]
    other.remove(4, 4)
    with other.forward(Batch([4], [4])):
        assert mx.array_equal(other.layer(3).get()[1], image + 1)
        other.set_layer_type(1)
        assert mx.array_equal(other.layer(0).get()[0], state + 3)


def test_states_of_another_form_are_refused(tmp_path: Path) -> None:
    caches = []
    for state in (mx.zeros((3,)), mx.zeros((3, 3))):
        caches.append(RecurrentCache())
        caches[-1].init()
        with caches[-1].forward(Batch([0], [0])):
            caches[-1].put(state)
    save(tmp_path / "a", caches[0], 0)
    with pytest.raises(CacheFileError, match="the state of layer 0 has"):
        load(tmp_path / "a", caches[1], 1)
    assert caches[1].end(1) == 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = CausalCache()
    cache.init(mx.float32, capacity=100, quantization=Quantization(8, group_size=32, after=10))
    for n in (4, 12):
        kv = mx.random.normal((1, 2, n, 32), key=mx.random.key(n))
        with cache.forward(Batch.run(0, cache.end(0), n)):
            for layer in range(2):
                cache.layer(layer).put(kv, kv)
    save(tmp_path / "a", cache, 0, range(16), model={"configuration": "1234"})
    return tmp_path / "a"


def unchanged(path: Path, error: type[CacheError], message: str, cache: Any = None, **options: Any) -> None:
    """Loading is refused, and the cache is as it was."""
    if cache is None:
        cache = CausalCache()
        cache.init(mx.float32, capacity=100)
    with cache.forward(Batch([0], [9])):
        kv = mx.ones((1, 2, 1, 32))
        cache.layer(0).put(kv, kv)
    before = dict(cache._table.sequences), cache._table.live, cache.nbytes, set(cache._store.layers)
    with pytest.raises(error, match=message) as caught:
        load(path, cache, 1, **options)
    assert type(caught.value) is error
    assert (dict(cache._table.sequences), cache._table.live, cache.nbytes, set(cache._store.layers)) == before
    cache.check()


def test_a_file_of_another_model_cache_or_size_is_refused(saved: Path) -> None:
    unchanged(
        saved,
        CacheFileError,
        "its configuration is 1234, this one's is 5678",
        model={"configuration": "5678", "tokenizer": "unknown"},
    )
    window = SlidingWindowCache(8)
    window.init(mx.float32)
    unchanged(
        saved, CacheFileError, "cannot load a cache of kind causal into one of kind window, size 8", window
    )
    small = CausalCache()
    small.init(mx.float32, capacity=10)
    unchanged(saved, CacheFullError, "16 cells needed, 9 free of a capacity of 10", small)
    wide = CausalCache()
    wide.init(mx.float32)
    with wide.forward(Batch([0], [3])):
        wide.layer(1).put(mx.ones((1, 4, 1, 32)), mx.ones((1, 4, 1, 32)))
    with pytest.raises(
        CacheFileError, match=r"layer 1 has 2 heads of 32 and 32 features .*, this cache has 4"
    ):
        load(saved, wide, 1)
    narrow = CausalCache()
    narrow.init(mx.float32, quantization=Quantization(8, group_size=64))
    with pytest.raises(CacheFileError, match=r"head_dim 32 of .* is not a multiple of group_size 64"):
        load(saved, narrow, 1)


def test_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    cache = CausalCache()
    cache.init()
    with pytest.raises(ValueError, match="3 tokens for a sequence of 0"):
        save(tmp_path / "a", cache, 0, [1, 2, 3])
    assert not (tmp_path / "a").exists()
    with pytest.raises(CacheError, match="init must come first"):
        save(tmp_path / "a", CausalCache(), 0)


def lie(path: Path, change: Change) -> None:
    """Write the file again with another header, and checksums that are right."""
    contents = read_contents(path)
    arrays = dict(read_arrays(contents))
    header = json.loads(json.dumps(contents.header))
    change(header, arrays)
    write(path, header, arrays)


def in_cache(name: str, value: Any) -> Change:
    return lambda header, arrays: header["caches"][0].__setitem__(name, value)


def in_run(name: str, value: Any) -> Change:
    return lambda header, arrays: header["caches"][0]["runs"][0].__setitem__(name, value)


def in_layer(name: str, value: Any) -> Change:
    return lambda header, arrays: header["caches"][0]["layers"]["1"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_cache("end", 15), "a cache in the file holds 15 tokens, but the file is for 16"),
        (in_run("length", 17), "length of a run is 17, expected a whole number from 1 to 16"),
        (in_cache("end", True), "end is True"),
        (in_cache("end", -1), "end is -1"),
        (in_cache("end", 2**60), "end is"),
        (in_cache("runs", None), "runs is None, expected a list"),
        (in_cache("runs", [{"begin": 0, "length": 0}]), "length of a run is 0"),
        (in_cache("layers", {}), "layers is empty, but the file has 1 runs"),
        (in_cache("layers", {"x": {}}), "'x' is not a layer index"),
        (in_run("begin", 3), "length of a run is"),
        (in_run("length", 2**39), "length of a run is"),
        (in_run("packed", False), "is missing"),
        (in_layer("heads", 3), r"is \(1, 2, .* expected \(1, 3"),
        (in_layer("dims", [64, 32]), r"expected \(1, 2, "),
        (in_layer("dims", [0, 0]), "head_dim of keys is 0"),
        (in_layer("dims", [32]), "expected a list of 2"),
        (in_layer("dtypes", ["I32", "F32"]), "expected floats"),
        (in_layer("dtypes", ["F64", "F32"]), r"dtypes \['F64', 'F32'\], expected floats"),
        (in_layer("codecs", [[7, 32], None]), "7 bits"),
        (in_layer("codecs", [[4, 32], [8, 32]]), r"expected \(1, 2, "),
        (lambda header, arrays: header.pop("caches"), "caches is None"),
        (lambda header, arrays: header["caches"].append({}), "expected a list of 1"),
        (lambda header, arrays: header.update(end=17), r"array 'tokens' is \(16,\)"),
        (lambda header, arrays: header.update(model=[]), "model is"),
        (lambda header, arrays: arrays.pop("tokens"), "array 'tokens' is missing"),
        (lambda header, arrays: arrays.pop("0.0.0.keys.words"), "array '0.0.0.keys.words' is missing"),
    ],
)
def test_a_header_that_lies_is_refused(saved: Path, change: Change, message: str) -> None:
    lie(saved, change)
    unchanged(saved, CacheFileError, message)


def test_random_lies_do_no_harm(saved: Path) -> None:
    """Any part of the header exchanged for something else: a cache with its invariants, or a refusal."""
    rng = random.Random(5)
    original, refused = saved.read_bytes(), 0
    values = [None, True, -1, 0, 1, 7, 2**50, 0.5, "x", "0", [], {}, [1, 2], [None, None], {"1": 2}]

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(value, (dict, list)):
            for key in value.keys() if isinstance(value, dict) else range(len(value)):
                yield value, key
                yield from places(value[key])

    def change(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        holder, key = rng.choice(list(places(header)))
        holder[key] = rng.choice(values)

    for _ in range(400):
        saved.write_bytes(original)
        lie(saved, change)
        cache = CausalCache()
        cache.init(mx.float32, capacity=100)
        try:
            load(saved, cache, 1)
        except CacheFileError:
            refused += 1
        cache.check()
        if cache.can_resume(1, cache.end(1)):
            kv = mx.ones((1, 2, 1, 32))
            with cache.forward(Batch([cache.end(1)], [1])):
                for layer in cache._store.layers or [0]:
                    cache.layer(layer).put(kv, kv)
                assert mx.isfinite(cache.layer(0).get()[0]).all().item()
    assert 200 < refused < 400


def test_no_damage_passes_unseen(saved: Path) -> None:
    """1,000 files with flipped bytes, cut or made longer: each is refused, and the cache is as it was."""
    rng = random.Random(3)
    original = saved.read_bytes()
    cache = CausalCache()
    cache.init(mx.float32, capacity=100)
    for _ in range(1000):
        damaged = bytearray(original)
        kind = rng.randrange(4)
        if kind < 2:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] ^= rng.randint(1, 255)
        elif kind == 2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            at = rng.randrange(len(damaged))
            damaged[at:at] = rng.randbytes(rng.randint(1, 9))
        if damaged == original:
            continue
        saved.write_bytes(damaged)
        with pytest.raises(CacheFileError):
            load(saved, cache, 1)
        assert not cache._table.sequences and not cache._store.layers


def test_saving_holds_no_views(tmp_path: Path) -> None:
    """A view that lived on would make the next write copy the whole buffer."""
    cache = CausalCache()
    cache.init(mx.float32, capacity=5000, max_batch=4000)
    kv = mx.zeros((1, 2, 4000, 64))
    with cache.forward(Batch.run(0, 0, 4000)):
        cache.put(kv, kv)
    save(tmp_path / "a", cache, 0)
    token = mx.ones((1, 2, 1, 64))
    mx.eval(cache._store.arrays, token)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with cache.forward(Batch.run(0, 4000, 1)):
        cache.put(token, token)
        mx.eval(cache._store.arrays)
    assert mx.get_peak_memory() - before < kv.nbytes // 4
    assert np.isfinite(before)


def filled_with(layers: int) -> CausalCache:
    cache = CausalCache()
    cache.init(mx.float32, capacity=32)
    with cache.forward(Batch.run(0, 0, 4)):
        for layer in range(layers):
            cache.layer(layer).put(mx.ones((1, 2, 4, 8)), mx.ones((1, 2, 4, 8)))
    return cache


def test_a_file_that_lacks_layers_of_the_cache_is_refused(tmp_path: Path) -> None:
    """Those that it lacks would be read as zeros."""
    save(tmp_path / "a", filled_with(2), 0)
    cache = filled_with(3)
    with pytest.raises(CacheFileError, match=r"the file has layers \[0, 1\], but this cache has \[0, 1, 2\]"):
        load(tmp_path / "a", cache, 1)
    assert cache.end(1) == 0
    cache = filled_with(2)
    load(tmp_path / "a", cache, 1)
    assert cache.end(1) == 4


def test_a_state_that_lacks_layers_of_the_cache_is_refused(tmp_path: Path) -> None:
    def cache_of(layers: int) -> RecurrentCache:
        cache = RecurrentCache()
        cache.init()
        with cache.forward(Batch.run(0, 0, 4)):
            for layer in range(layers):
                cache.layer(layer).put(mx.ones((3,)))
        return cache

    save(tmp_path / "a", cache_of(1), 0)
    cache = cache_of(2)
    with pytest.raises(CacheFileError, match=r"the file has layers \[0\], but this cache has \[0, 1\]"):
        load(tmp_path / "a", cache, 1)
    assert cache.end(1) == 0


@pytest.mark.parametrize("verify", [True, False])
def test_what_one_thread_loads_another_uses(verify: bool, tmp_path: Path) -> None:
    save(tmp_path / "a", filled_with(1), 0)
    cache = CausalCache()
    cache.init(mx.bfloat16, capacity=32)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: load(tmp_path / "a", cache, 0, verify=verify)).result()
    with cache.forward(Batch.run(0, 4, 1)):
        cache.layer(0).put(mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 8)))
        assert mx.all(cache.layer(0).get()[0] == 1).item()
