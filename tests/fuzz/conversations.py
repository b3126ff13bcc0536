"""Files of prompt caches, of this package and of mlx-lm, whose contents are not right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache as make_theirs
from mlx_lm.models.cache import save_prompt_cache

from mlx_kvcache import CacheError, CacheFileError, CacheFullError
from mlx_kvcache.persist.container import Stored, read_arrays, read_contents
from mlx_kvcache.persist.header import METADATA
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from mlx_kvcache.plugin.hosts.mlx_lm_files import read_foreign
from tests.plugin.files.make import path_of

from .blobs import own_file, plain_file, split
from .bounds import bounded, file_of, folder
from .damage import Edit, array_edits, edited, edited_arrays, edits, edits_with
from .models import MODELS, held, run
from .sequences import state_of
from .target import Target, drawn

STORAGES: tuple[dict[str, Any], ...] = ({}, {"kv_bits": (6, 4), "kv_group_size": 32})


class Source(NamedTuple):
    """What a valid file says and holds."""

    told: Any
    arrays: dict[str, Stored]


class Damaged(NamedTuple):
    """A file of a model's cache, edited, and how it is loaded."""

    model: str
    told: list[Edit]
    arrays: list[Edit]
    options: dict[str, Any]
    verify: bool
    storage: int = 0


CLASSES = ["KVCache", "RotatingKVCache", "ChunkedKVCache", "QuantizedKVCache", "ArraysCache", "CacheList"]
WORDS = ("", "0", "1", "-1", "1e9", "a", "scalar", "none", "string", *CLASSES)
places = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(lambda path: ".".join(map(str, path)))
texts = st.sampled_from(WORDS) | places


def _damaged(changes: st.SearchStrategy[list[Edit]]) -> st.SearchStrategy[Damaged]:
    options = st.fixed_dictionaries(
        {},
        optional={
            "capacity": st.sampled_from((None, 5, 24, 30)),
            "overflow": st.sampled_from(("error", "shift")),
            "kv_bits": st.sampled_from((None, 4)),
            "kv_group_size": st.just(32),
        },
    )
    names = st.sampled_from(MODELS)
    is_packed = st.integers(0, len(STORAGES) - 1)
    return st.builds(Damaged, names, changes, array_edits, st.just({}) | options, st.booleans(), is_packed)


@cache
def ours(name: str, storage: int) -> Source:
    """A saved conversation of 24 tokens, some of which were removed where that can be done."""
    model, _ = held(name)
    prompt_cache = make_prompt_cache(model, **STORAGES[storage])
    # A recurrence can go back to the ends of blocks.
    run(model, prompt_cache, 24)
    run(model, prompt_cache, 2)
    try:
        prompt_cache.remove(8, 10)
    except CacheError:
        prompt_cache.rewind_to(prompt_cache.resume_point(24))
    path = folder() / "source.safetensors"
    prompt_cache.save(path, tokens=range(prompt_cache.position))
    contents = read_contents(path)
    return Source(contents.header, dict(read_arrays(contents)))


@cache
def theirs(name: str) -> Source:
    """The same by mlx-lm, whose metadata is a table of texts."""
    model, _ = held(name)
    prompt_cache = make_theirs(model)
    run(model, prompt_cache, 9)
    path = str(folder() / "theirs.safetensors")
    save_prompt_cache(path, prompt_cache, {"model": "tiny"})
    return _source((folder() / "theirs.safetensors").read_bytes())


def _source(raw: bytes) -> Source:
    text, body = split(raw)
    fields = json.loads(text)
    told, arrays = fields.pop(METADATA), {}
    for array, field in fields.items():
        begin, end = field["data_offsets"]
        data = np.frombuffer(body[begin:end], np.uint8)
        arrays[array] = Stored(field["dtype"], tuple(field["shape"]), data)
    return Source(told, arrays)


def check_ours(damaged: Damaged) -> None:
    """A file of this package."""
    source = ours(damaged.model, damaged.storage)
    header = edited(source.told, damaged.told)
    _check(damaged, own_file(header, edited_arrays(source.arrays, damaged.arrays)))


def check_theirs(damaged: Damaged) -> None:
    """A file of mlx-lm."""
    source = theirs(damaged.model)
    _check(
        damaged, plain_file(edited(source.told, damaged.told), edited_arrays(source.arrays, damaged.arrays))
    )


def _check(damaged: Damaged, data: bytes) -> None:
    """It is refused and nobody suffers, or what is loaded goes on."""
    model, bystander = held(damaged.model)
    path, before = file_of(data), _state(bystander)
    try:
        with bounded(len(data)):
            loaded = PromptCache.load(path, model, verify=damaged.verify, **damaged.options)
    except (CacheFileError, CacheFullError):
        assert _state(bystander) == before
        return
    except (ValueError, CacheError):
        # Options that do not suit the model.
        assert damaged.options
        assert _state(bystander) == before
        return
    assert path.read_bytes() == data
    _use(model, loaded)
    loaded.close()
    assert _state(bystander) == before


def _state(bystander: PromptCache) -> list[Any]:
    """The bookkeeping of a pool, after what nobody holds any more has gone."""
    assert bystander.pool.nbytes
    return [state_of(own) for own in bystander.pool.caches]


def _use(model: Any, loaded: PromptCache) -> None:
    position = loaded.position
    for point in range(min(position, 40) + 1):
        assert loaded.resume_point(point) <= point
    assert loaded.nbytes >= 0
    fork = loaded.fork()
    try:
        run(model, fork, 2)
        if loaded.capacity is None:
            assert fork.position == position + 2
    except (CacheError, ValueError):
        # States may be of shapes that the model cannot go on with, which only it knows.
        assert fork.position == position
    fork.rewind_to(fork.resume_point(fork.position // 2))
    fork.close()


def check_foreign(data: bytes) -> None:
    """Any bytes as a file of mlx-lm's."""
    path = file_of(data)
    try:
        with bounded(len(data)):
            foreign = read_foreign(path)
    except CacheFileError:
        return
    assert foreign.end >= 0


def _foreign_files() -> Iterator[bytes]:
    for version in ("0.31.3", "0.32.2"):
        for what in ("every", "three"):
            yield path_of(version, what).read_bytes()
    for name in MODELS:
        source = theirs(name)
        yield plain_file(source.told, source.arrays)


NAMES = (
    "__metadata__ KVCache RotatingKVCache ChunkedKVCache QuantizedKVCache ArraysCache CacheList scalar none "
    "string 0 1 2 0.0 0.1 0.2 0.3 1.0 1.1 1.2 2.0 2.0.0 2.1.0 2.1.1 0.0.0 10000 99999 -1 dtype shape "
    "data_offsets F32 F16 BF16 U32 I32 U8 BOOL"
)

OURS = drawn("conversation", "damaged prompt cache files with right checksums", _damaged(edits), check_ours)
THEIRS = drawn("theirs", "damaged prompt cache files of mlx-lm's", _damaged(edits_with(texts)), check_theirs)
FOREIGN = Target(
    "foreign",
    "any bytes as a prompt cache file of mlx-lm's",
    check_foreign,
    _foreign_files,
    tuple(word.encode() for name in NAMES.split() for word in (name, f'"{name}"')),
    1 << 15,
)
