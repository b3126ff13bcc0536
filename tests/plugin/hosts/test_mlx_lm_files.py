"""Files of mlx-lm's: from its caches to ours, and back."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError, CacheFileError
from mlx_kvcache.plugin import PromptCache, attach, make_prompt_cache
from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from mlx_kvcache.plugin.hosts.mlx_lm_files import read_foreign
from tests.plugin.configurations import DIFFERS_IN_BLOCKS, build
from tests.plugin.files.make import path_of
from tests.plugin.running import difference, logits_of
from tests.plugin.test_files import SOME, STORAGE, TEXT
from tests.plugin.test_quantized import model_of
from tests.plugin.tiny import tiny_llama


@pytest.mark.parametrize("name", SOME)
def test_files_of_mlx_lms_own_caches(name: str, tmp_path: Path) -> None:
    """From its caches to ours, after windows have slid, as rings and in blocks."""
    model, path = model_of(name), str(tmp_path / "theirs.safetensors")
    for sizes in (1, 13):
        theirs = make_theirs(model)
        logits_of(model, theirs, TEXT[:30], 1 if name in DIFFERS_IN_BLOCKS else sizes)
        save_prompt_cache(path, theirs, {"model": "tiny"})
        ours = PromptCache.load(path, model)
        assert ours.position == 30 and ours.tokens is None
        expected = logits_of(model, theirs, TEXT[30:34], 1)
        assert difference(logits_of(model, ours, TEXT[30:34], 1), expected) <= 1e-4 * mx.std(expected)


@pytest.mark.parametrize("storage", STORAGE, ids=["float", "packed", "transformed", "centered"])
@pytest.mark.parametrize("name", SOME)
def test_files_for_mlx_lm(name: str, storage: dict[str, Any], tmp_path: Path) -> None:
    """And the other way round; by mlx-lm's own function too, where a model is attached."""
    model = model_of(name)
    cache = make_prompt_cache(model, **storage)
    logits_of(model, cache, TEXT[:30], 6)
    cache.save(tmp_path / "a.safetensors", format="mlx-lm")
    with attach(model):
        # Looked up as mlx-lm's commands do.
        mlx_lm_cache.save_prompt_cache(str(tmp_path / "b"), cache, {"model": "tiny"})
    assert mlx_lm_cache.save_prompt_cache is save_prompt_cache
    ours = PromptCache.load(tmp_path / "a.safetensors", model)
    keyed = [(one, other) for one, other in zip(cache, ours, strict=True) if hasattr(one, "plain_state")]
    for one, other in keyed:
        assert all(mx.array_equal(a, b) for a, b in zip(one.plain_state[:2], other.state[:2], strict=True))
    if not storage:
        assert difference(logits_of(model, cache, [5]), logits_of(model, ours.fork(), [5])) <= 1e-5
    expected = logits_of(model, ours, TEXT[30:34], 1)
    for file in ("a", "b"):
        theirs = load_prompt_cache(str(tmp_path / f"{file}.safetensors"))
        assert difference(logits_of(model, theirs, TEXT[30:34], 1), expected) <= 1e-3 * mx.std(expected)


RANGES: dict[str, list[tuple[tuple[int, int], ...]]] = {
    "KVCache": [((0, 20),)],
    "RotatingKVCache": [((12, 8),), ((0, 2), (14, 6)), ((0, 2), (8, 12)), ((0, 20),)],
    "ChunkedKVCache": [((0, 20),)],
    "ArraysCache": [()],
}


@pytest.mark.parametrize("version", ["0.31.3", "0.32.2"])
def test_every_class_of_mlx_lm(version: str) -> None:
    """Files that these versions wrote, in which tokens are their position."""
    foreign = read_foreign(path_of(version, "every"))
    assert foreign.end == 20
    found: dict[str, list[Any]] = {}
    for entry in foreign.entries:
        found.setdefault(entry.name, []).append(entry.ranges)
        told = [p for begin, length in entry.ranges for p in range(begin, begin + length)]
        for lane, sign in zip(entry.lanes or (), (1, -1), strict=False):
            assert lane.decoded(mx.float32)[0, 0, :, 5].tolist() == [sign * p for p in told]
    assert {name: list(dict.fromkeys(ranges)) for name, ranges in found.items()} == RANGES
    assert [array.shape for array in foreign.entries[-1].arrays if array is not None] == [(1, 3), (1, 4, 2)]


def three_layers() -> nn.Module:
    """A model whose caches are those of the files of three layers."""
    model = tiny_llama(head_dim=32, num_key_value_heads=1, dtype=mx.float16)
    model.make_cache = lambda: [
        mlx_lm_cache.KVCache(),
        mlx_lm_cache.RotatingKVCache(8, keep=2),
        mlx_lm_cache.KVCache(),
    ]
    return model


@pytest.mark.parametrize("version", ["0.31.3", "0.32.2"])
def test_a_file_of_an_old_version_loads(version: str) -> None:
    cache = PromptCache.load(path_of(version, "three"), three_layers())
    assert cache.position == 20
    assert cache[0].state[0][0, 0, :, 0].tolist() == list(range(20))
    assert cache[1].state[1][0, 0, :, 0].tolist() == [0, -1, *range(-14, -20, -1)]
    assert cache.can_resume(20) and not cache.can_resume(15)


def test_files_of_mlx_lm_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_llama(head_dim=32, num_key_value_heads=1)
    with pytest.raises(CacheFileError, match=r"layer 1 is .* in the file and KVCache\(\) in the model"):
        PromptCache.load(path_of("0.32.2", "three"), model)
    with pytest.raises(CacheFileError, match="the file has 10 layers, the model 3"):
        PromptCache.load(path_of("0.32.2", "every"), model)
    model = tiny_llama(head_dim=64, num_hidden_layers=1)
    path = str(tmp_path / "a.safetensors")
    for shape, message in (((1, 2, 5, 32), r"has .*\(2, 32, 32\), the model's has \(2, 64, 64\)"),
                           ((2, 2, 5, 64), "holds a batch")):  # fmt: skip
        theirs = mlx_lm_cache.KVCache()
        theirs.update_and_fetch(mx.zeros(shape), mx.zeros(shape))
        save_prompt_cache(path, [theirs])
        with pytest.raises(CacheFileError, match=message):
            PromptCache.load(path, model)
    mamba = build("mamba")
    theirs = make_theirs(mamba)
    logits_of(mamba, theirs, TEXT[:5])
    save_prompt_cache(path, theirs)
    with pytest.raises(CacheFileError, match="do not record the number of tokens"):
        PromptCache.load(path, mamba)
    for told in ({}, {"format": "mlx"}):
        mx.save_safetensors(path, {"model.norm.weight": mx.zeros(3)}, told)
        with pytest.raises(
            CacheFileError, match=r"without a prompt cache, such as a model's weights .*; expected a file"
        ):
            PromptCache.load(path, model)
    mx.save_safetensors(path, {"0.0": mx.zeros(3)}, {"1.0": "KVCache", "2.0": ""})
    with pytest.raises(CacheFileError, match=r"not in the format of mlx-lm 0\.31 or 0\.32$"):
        PromptCache.load(path, model)


def test_nothing_that_a_file_names_is_called(tmp_path: Path) -> None:
    """mlx-lm would look the class up among all names of its module."""
    path = str(tmp_path / "a.safetensors")
    keys = mx.zeros((1, 2, 5, 8))
    for name in ("tree_map", "make_prompt_cache", "LRUPromptCache", "__builtins__"):
        mx.save_safetensors(path, {"0.0": keys, "0.1": keys}, {"0.model": "", "1.0": name, "2.0": ""})
        with pytest.raises(CacheFileError, match="is not one of KVCache"):
            PromptCache.load(path, tiny_llama())


LONG_LISTS = {
    "large": ["0.99999999999"],
    "zeros": ["0.00000000099999999"],
    "underscores": ["0.99_999_999"],
    "signed": ["0.+99999999"],
    "deep": ["0." * 40 + "0"],
    "many": [".".join(["9999"] * i) for i in range(1, 20)],
}
"""Names of arrays by which MLX would make lists of very many entries."""


@pytest.mark.parametrize("names", LONG_LISTS.values(), ids=LONG_LISTS)
def test_names_do_not_make_lists_long(names: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    arrays, model = {name: mx.zeros((1, 2, 5, 8)) for name in names}, tiny_llama()
    mx.save_safetensors(path, arrays, {"0.model": "", "1.0": "KVCache", "2.0": ""})
    tracemalloc.start()
    try:
        with pytest.raises(CacheFileError, match="exceeds 32 nested lists or 100,000 list entries"):
            PromptCache.load(path, model)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_damage_in_files_of_mlx_lm_is_a_cache_error(tmp_path: Path) -> None:
    """They have no checksums: what can be told is refused, and nothing else is raised."""
    rng, path, model = random.Random(2), tmp_path / "a.safetensors", three_layers()
    original = path_of("0.31.3", "three").read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(600)] ^= rng.randint(1, 255)
        path.write_bytes(damaged if rng.random() < 0.8 else damaged[: rng.randrange(len(damaged))])
        try:
            PromptCache.load(path, model)
        except CacheError:
            refused += 1
    assert refused > 150


def theirs_with(place: str, value: int, folder: Path) -> Path:
    """The file of every class as 0.32.2 wrote it, with another number at one place."""
    arrays: Any
    metadata: Any
    arrays, metadata = mx.load(str(path_of("0.32.2", "every")), return_metadata=True)
    path = folder / "changed.safetensors"
    mx.save_safetensors(str(path), arrays | {place: mx.array(value)}, metadata)
    return path


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("0.2", -1, "number of tokens is -1, expected"),
        ("0.2", 300, "arrays of KVCache do not have the 300 tokens that it records"),
        ("0.2", 19, r"layers end at different positions: \[19, 20\]"),
        ("6.4", 4, "quantized array has 8 words, expected 32 features of 4 bits"),
        ("6.4", 7, "bits"),
    ],
)
def test_numbers_that_cannot_be(place: str, value: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match=message):
        read_foreign(theirs_with(place, value, tmp_path))


@pytest.mark.skipif(MLX_LM.keeps_numbers_apart, reason="mlx-lm 0.31 does not save caches that are empty")
def test_caches_that_have_read_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    save_prompt_cache(
        str(path),
        [
            mlx_lm_cache.KVCache(),
            mlx_lm_cache.RotatingKVCache(8, keep=2),
            mlx_lm_cache.ChunkedKVCache(16),
            mlx_lm_cache.QuantizedKVCache(group_size=32, bits=8),
        ],
    )
    foreign = read_foreign(path)
    assert foreign.end == 0
    assert [(entry.lanes, entry.ranges, entry.sizes) for entry in foreign.entries] == [
        (None, (), ()),
        (None, (), (8, 2)),
        (None, (), (16,)),
        (None, (), ()),
    ]


def test_chunks_of_which_0_31_does_not_say_enough(tmp_path: Path) -> None:
    path, keys = tmp_path / "chunks.safetensors", mx.zeros((1, 2, 5, 8))
    for start in (0, 16):
        told = {"0.0.0": "16", "0.0.1": str(start), "1.model": "", "2.0": "ChunkedKVCache"}
        mx.save_safetensors(str(path), {"0.0": keys, "0.1": keys}, told)
        if start:
            with pytest.raises(CacheFileError, match="record the end of chunks that start at position 16"):
                read_foreign(path)
        else:
            assert read_foreign(path).entries[0].ranges == ((0, 5),)


def test_a_file_whose_arrays_end_early(tmp_path: Path) -> None:
    whole, path = path_of("0.32.2", "three").read_bytes(), tmp_path / "short.safetensors"
    path.write_bytes(whole[:-8])
    with pytest.raises(CacheFileError, match=r"short\.safetensors"):
        read_foreign(path)
