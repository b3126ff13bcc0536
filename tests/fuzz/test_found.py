"""What fuzzing has found."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import (
    Batch,
    CacheFileError,
    CausalCache,
    ChunkedAttentionCache,
    EncoderCache,
    NotSupportedError,
    Quantization,
    RecurrentCache,
    SlidingWindowCache,
    WrapperCache,
    attention,
    slide,
)
from mlx_kvcache.persist import save
from mlx_kvcache.persist.container import Stored
from mlx_kvcache.persist.disk_cache import PrefixFolder
from mlx_kvcache.plugin import Many, PromptCache, make_prompt_cache, make_session_pool
from mlx_kvcache.plugin.hosts.mlx_lm_files import read_foreign

from .blobs import own_file, plain_file
from .conversations import ours, theirs
from .folders import write
from .models import held, run


def test_bits_in_a_file_that_are_lists(tmp_path: Path) -> None:
    source = ours("llama", 1)
    options = source.told["options"] | {"kv_bits": [[[8], 8], [8, {}]]}
    path = tmp_path / "a"
    path.write_bytes(own_file(source.told | {"options": options}, source.arrays))
    with pytest.raises(CacheFileError, match=r"cannot quantize to \[8\] bits"):
        PromptCache.load(path, held("llama").model)


def test_a_recurrence_with_an_array_too_few(tmp_path: Path) -> None:
    """The model looked for the one that was not there."""
    model, path = held("qwen3_next").model, tmp_path / "few.safetensors"
    source = theirs("qwen3_next")
    names = sorted(name for name in source.arrays if name.startswith("0.0."))
    path.write_bytes(plain_file(source.told, {n: a for n, a in source.arrays.items() if n != names[-1]}))
    with pytest.raises(CacheFileError, match="layer 0 has 1 arrays, the model's has 2"):
        PromptCache.load(path, model)
    source = ours("qwen3_next", 0)
    told = deepcopy(source.told)
    told["caches"][0]["states"][-1]["layers"]["0"].pop()
    path.write_bytes(own_file(told, source.arrays))
    with pytest.raises(CacheFileError, match="layer 0 has 1 arrays, the model's has 2"):
        PromptCache.load(path, model)


def test_saved_options_that_the_model_cannot_have(tmp_path: Path) -> None:
    """There is no room beside as many sinks as the capacity, whatever the file says."""
    source, path = ours("qwen3_next", 0), tmp_path / "sinks.safetensors"
    told = deepcopy(source.told)
    told["options"] |= {"capacity": 64, "overflow": "shift", "sinks": 64}
    path.write_bytes(own_file(told, source.arrays))
    with pytest.raises(CacheFileError, match="sinks must be below the capacity of 64"):
        PromptCache.load(path, held("qwen3_next")[0])


@pytest.mark.parametrize("letters", [[2**40, 3], [2**31], [-1], [0x110000]])
def test_texts_that_are_no_texts(letters: list[int], tmp_path: Path) -> None:
    """A class's name in a file of mlx-lm's, as 0.32 writes texts: an array of letters."""
    source = theirs("deepseek_v32")
    data = np.array(letters, np.int64).view(np.uint8)
    arrays = source.arrays | {"0.0.1": Stored("I64", (len(letters),), data)}
    path = tmp_path / "a"
    path.write_bytes(plain_file(source.told, arrays))
    with pytest.raises(CacheFileError, match=r"not in the format of mlx-lm .*(too large|not in range)"):
        read_foreign(path)


@pytest.mark.parametrize("depth", [500, 5000])
def test_a_tree_that_is_too_deep(depth: int, tmp_path: Path) -> None:
    """Refused by its names, or where it is built."""
    path = tmp_path / "a"
    path.write_bytes(plain_file({f"0{'.0' * depth}": "x", "1.0": "KVCache", "2.0": ""}, {}))
    with pytest.raises(CacheFileError, match="not in the format of mlx-lm "):
        read_foreign(path)


def _changed(folder: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as connection:
        connection.execute(statement, values)


def _filled(folder: Path) -> None:
    with PrefixFolder(folder, 10**6, "model") as kept:
        for tokens in ((1, 2), (3, 4)):
            kept.put(tokens, None, write, 600)
        kept.flush()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("name", None),
        ("name", "../mine"),
        ("name", "mine"),
        ("digest", "x"),
        ("namespace", b"\xff"),
        ("salt", 1),
        ("tokens", b"1234567"),
        ("tokens", bytes(16)),
        ("tokens", "text"),
        ("nbytes", -1),
        ("nbytes", 2**62),
        ("used", 1.5),
        ("is_ready", "x"),
    ],
)
def test_an_entry_that_was_not_entered_so_is_forgotten(column: str, value: Any, tmp_path: Path) -> None:
    """And its file; the other is found, and what is nobody's business stays."""
    folder = tmp_path / "folder"
    _filled(folder)
    for own in (tmp_path / "mine", folder / "mine"):
        own.write_text("mine")
    _changed(folder, f"UPDATE entries SET {column} = ? WHERE rowid = 1", value)  # noqa: S608
    with PrefixFolder(folder, 10**6, "model") as opened:
        assert [found.tokens for _, found in opened.matches((3, 4), None)] == [(3, 4)]
        assert not opened.has((1, 2), None)
        assert opened.nbytes == 600
    assert len(list(folder.glob("*.kvcache"))) == 1
    for own in (tmp_path / "mine", folder / "mine"):
        assert own.read_text() == "mine"


@pytest.mark.parametrize("statement", ["DELETE FROM state", "UPDATE state SET stamp = 'x'"])
def test_a_stamp_that_is_none_is_made_anew(statement: str, tmp_path: Path) -> None:
    _filled(tmp_path)
    _changed(tmp_path, statement)
    with PrefixFolder(tmp_path, 10**6, "model") as opened:
        assert len(list(opened.matches((3, 4), None))) == 1


def test_damage_about_which_sqlite_has_no_text(tmp_path: Path) -> None:
    """It tells of the statement that made a table, which is no UTF-8 here."""
    _filled(tmp_path)
    index = tmp_path / "index.sqlite"
    _changed(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    index.write_bytes(index.read_bytes().replace(b"CREATE TABLE entries", b"CREATE TABL\xfd entries"))
    with PrefixFolder(tmp_path, 10**6, "model") as opened:
        assert opened.nbytes == 0
    assert index.with_name("index.sqlite.damaged").exists()


def _causal() -> CausalCache:
    cache = CausalCache()
    cache.init(mx.float32, capacity=300)
    with cache.forward(Batch.run(0, 0, 9)):
        cache.put(mx.ones((1, 1, 9, 2)), mx.ones((1, 1, 9, 2)))
    return cache


FRACTIONS: dict[str, Callable[[], Any]] = {
    "a window": lambda: SlidingWindowCache(4.5),  # type: ignore[arg-type]
    "sinks": lambda: SlidingWindowCache(4, sinks=0.5),  # type: ignore[arg-type]
    "a chunk": lambda: ChunkedAttentionCache(4.0),  # type: ignore[arg-type]
    "a rewind": lambda: ChunkedAttentionCache(4, rewind=float("nan")),  # type: ignore[arg-type]
    "an interval": lambda: RecurrentCache(1.5),  # type: ignore[arg-type]
    "a capacity": lambda: CausalCache().init(capacity=1.5),  # type: ignore[arg-type]
    "a length in float": lambda: Quantization(after=1.5),  # type: ignore[arg-type]
    "a layer": lambda: _causal().layer(0.5),  # type: ignore[arg-type]
    "a layer type": lambda: WrapperCache(CausalCache()).set_layer_type(0.5),  # type: ignore[arg-type]
    "a run": lambda: Batch.run(0.5, 0, 1),  # type: ignore[arg-type]
    "a removal": lambda: _causal().remove(0, 1.5),  # type: ignore[arg-type]
    "an end": lambda: _causal().remove(0, 1, 2.5),  # type: ignore[arg-type]
    "a copy": lambda: _causal().copy_prefix(0, 1, 2.5),  # type: ignore[arg-type]
    "a question": lambda: _causal().can_resume(0, 0.5),  # type: ignore[arg-type]
    "a slide": lambda: slide(_causal(), 0, 1.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions_are_no_numbers_of_tokens(name: str) -> None:
    with pytest.raises(TypeError, match=r"whole number|as an integer"):
        FRACTIONS[name]()


def test_numbers_of_eight_bits_count_as_far_as_others() -> None:
    """NumPy's would wrap where they were added up."""
    cache, number = _causal(), np.uint8
    with cache.forward(Batch.run(0, 9, 241)):
        cache.put(mx.ones((1, 1, 241, 2)), mx.ones((1, 1, 241, 2)))
    cache.copy_prefix(number(0), number(1), number(250))
    with cache.forward(Batch.run(number(1), number(250), number(8))):
        cache.put(mx.ones((1, 1, 8, 2)), mx.ones((1, 1, 8, 2)))
    assert cache.end(1) == 258
    cache.check()
    cache.remove(number(1), number(200))
    assert cache.end(1) == 200 and all(type(s) is int for s in cache._table.sequences)


@pytest.mark.parametrize("name", ["rewind", "rewind_to", "remove", "can_resume", "resume_point"])
def test_fractions_leave_a_prompt_cache_as_it_was(name: str) -> None:
    model = held("llama:window").model
    cache = make_prompt_cache(model)
    run(model, cache, 5)
    for wrong in (1.5, 2.0, float("nan"), "1", None):
        with pytest.raises(TypeError):
            getattr(cache, name)(wrong)
    assert cache.position == 5
    run(model, cache, 2)
    cache.rewind(np.int64(2))
    assert cache.position == 5 and type(cache.position) is int


def test_fractions_leave_layers_and_sessions_as_they_were() -> None:
    model = held("llama").model
    cache = make_prompt_cache(model)
    run(model, cache, 5)
    with pytest.raises(TypeError):
        cache[0].trim(1.5)
    assert cache.position == 5
    with pytest.raises(TypeError):
        Many(model, 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Many(model).add([1], max_tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        make_session_pool(model, max_bytes="1")  # type: ignore[arg-type]
    with make_session_pool(model) as pool, pool.open([1, 2, 3]) as session:
        run(model, session.cache, 3)
        for wrong in (lambda: session.remove(0.5, 1, None), lambda: session.shift(0.5)):  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                wrong()
        assert session.cache.position == len(session.tokens) == 3


@pytest.mark.parametrize(
    "options", [{"rewind": 1.5}, {"capacity": 8.5}, {"sinks": 0.5}, {"quantize_after": 1.5}]
)
def test_options_that_are_fractions(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a whole number, got .*5"):
        make_prompt_cache(held("llama").model, **options)


@pytest.mark.parametrize("token", [-1, 2**63, 2**70])
def test_tokens_that_no_file_can_hold(token: int, tmp_path: Path) -> None:
    cache = _causal()
    with pytest.raises(ValueError, match=f"token {token} is out of range, expected 0 to"):
        save(tmp_path / "a", cache, 0, [0] * 8 + [token])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 0, 2, 4), (1, 2, 2, 0)])
def test_keys_without_heads_or_features(shape: tuple[int, int, int, int]) -> None:
    """MLX's attention to no heads ends the process."""
    cache = CausalCache()
    cache.init(mx.float32)
    new = mx.zeros(shape)
    with pytest.raises(ValueError, match="at least 1 head of 1 feature"), cache.forward(Batch.run(0, 0, 2)):
        attention(new, new, new, cache, scale=1.0)
    assert cache.end(0) == 0 and not cache.nbytes


def test_attention_to_an_encoder_without_heads() -> None:
    cache, queries = EncoderCache(), mx.zeros((1, 2, 2, 4))
    cache.init(mx.float32)
    for wrong in (mx.zeros((1, 0, 3, 4)), mx.zeros((3, 4))):
        with (
            pytest.raises(ValueError, match=r"of layer 0 are .*, expected"),
            cache.forward(Batch.run(0, 0, 2)),
        ):
            attention(queries, wrong, wrong, cache, scale=1.0)


def test_attention_to_what_holds_no_keys() -> None:
    cache, new = RecurrentCache(), mx.zeros((1, 1, 1, 4))
    cache.init(mx.float32)
    with pytest.raises(NotSupportedError, match="RecurrentCache, which stores no keys"):
        attention(new, new, new, cache, scale=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, 1, 4])
def test_a_model_may_put_more_checkpoints_than_stay(most: int) -> None:
    """`check` took this for too many."""
    cache = RecurrentCache(interval=1, max_checkpoints=most)
    cache.init()
    with cache.forward(Batch.run(0, 0, 20)):
        for layer in (0, 1):
            for at in range(1, 21):
                cache.layer(layer).put(mx.array(at), at=at)
    cache.check()
    assert all(cache.can_resume(0, position) for position in range(21))
    cache.start_forward(Batch.run(0, 20, 1))
    cache.check()
    assert sum(cache.can_resume(0, position) for position in range(1, 21)) == most
