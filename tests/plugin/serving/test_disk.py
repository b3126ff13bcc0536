"""Session pools with a folder behind them: what leaves memory comes back, also for others."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError, CacheFileError
from mlx_kvcache.plugin import make_session_pool
from mlx_kvcache.radix_tree import PrefixTree
from mlx_kvcache.sessions import SessionPool
from tests.interrupts import Planted
from tests.plugin.running import difference, logits_of, model_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(200)]
MODEL = tiny_llama(head_dim=64)


_begun: dict[int, tuple[nn.Module, tuple[int, ...], Any]] = {}
"""For each model, mlx-lm's caches after some tokens, with which the next prompts may begin, too."""


def afresh(model: nn.Module, tokens: list[int]) -> mx.array:
    """The last logits of mlx-lm's own caches, token by token."""
    end = len(tokens) * 2 // 3 // 20 * 20
    _, read, cache = _begun.get(id(model), (model, (), None))
    if end and read != tuple(tokens[:end]):
        cache = make_theirs(model)
        logits_of(model, cache, tokens[:end], 1)
        _begun[id(model)] = model, tuple(tokens[:end]), cache
    cache = copy.deepcopy(cache) if end else make_theirs(model)
    return logits_of(model, cache, list(tokens[end:]), 1)[-1:]


def say(pool: SessionPool, tokens: list[int], model: nn.Module = MODEL, exact: float = 2e-4) -> int:
    """A turn whose answer must be that of a fresh computation; how many tokens were there already."""
    with pool.open(tokens) as session:
        logits = logits_of(model, session.cache, session.rest)[-1:]
        assert difference(logits, afresh(model, tokens)) <= exact
        return session.reused


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_conversations_with_little_memory(name: str, tmp_path: Path) -> None:
    """Random prompts over few tokens, of which memory keeps one and the folder some."""
    model, rng = model_of(name), random.Random(1)
    known: list[list[int]] = [TEXT[:12]]
    with make_session_pool(model, max_stored=1, folder=tmp_path, rewind=8) as pool:
        for _ in range(40):
            base = rng.choice(known)
            tokens = base[: rng.randrange(1, len(base) + 1)] + rng.choices(range(90), k=rng.randrange(5))
            say(pool, tokens, model)
            assert len(pool) <= 1
            known = [*known[-6:], tokens]
            if rng.random() < 0.3:
                assert pool._disk is not None
                pool._disk.folder.flush()
        assert pool.counts.from_disk > 2 and pool.counts.to_disk > 5
        assert pool.counts.evicted > 5 and not pool.counts.rejected


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}], ids=["float", "packed"])
def test_after_a_restart(options: dict[str, Any], tmp_path: Path) -> None:
    exact = 2e-4 if not options else 0.5
    with make_session_pool(MODEL, folder=tmp_path, **options) as pool:
        assert say(pool, TEXT[:60], exact=exact) == 0
        assert say(pool, TEXT[:40] + TEXT[100:120], exact=exact) == 40
    pool.close()
    assert len(pool) == 0
    with make_session_pool(MODEL, folder=tmp_path, **options) as pool:
        assert say(pool, TEXT[:70], exact=exact) == 60
        assert pool.counts.from_disk == 1
        # What came out of a file serves from memory then.
        assert say(pool, TEXT[:65], exact=exact) == 64
        assert pool.counts.from_disk == 1
        assert say(pool, TEXT[:40] + TEXT[100:130], exact=exact) == 60


def test_what_is_stored_otherwise_is_not_found(tmp_path: Path) -> None:
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        say(pool, TEXT[:50])
    for model, options in (
        (MODEL, {"kv_bits": 8}),
        (tiny_llama(head_dim=64, rms_norm_eps=1e-6), {}),
    ):
        with make_session_pool(model, folder=tmp_path, **options) as pool:
            assert say(pool, TEXT[:60], model, exact=1.0) == 0
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        assert pool.open(TEXT[:60], salt="tenant").reused == 0
        assert say(pool, TEXT[:60]) == 50


def test_the_folders_bytes_are_bounded(tmp_path: Path) -> None:
    with make_session_pool(MODEL, max_stored=0, folder=tmp_path, folder_bytes=400_000) as pool:
        for i in range(12):
            say(pool, [i, *TEXT[:39]])
            assert pool._disk is not None
            pool._disk.folder.flush()
            files = [file.stat().st_size for file in tmp_path.glob("*.kvcache")]
            assert sum(files) <= 400_000
        assert len(files) > 2
        assert say(pool, [11, *TEXT[:45]]) == 40
        assert say(pool, [0, *TEXT[:45]]) == 0


def test_damaged_files_are_misses(tmp_path: Path) -> None:
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        say(pool, TEXT[:40])
        say(pool, TEXT[:20] + TEXT[50:60])
    for file in tmp_path.glob("*.kvcache"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        assert say(pool, TEXT[:50]) == 0
        assert pool._disk is not None and pool._disk.folder.counts["discarded"] == 2
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        assert say(pool, TEXT[:50]) == 49


def test_salts_that_cannot_be_written_stay_in_memory(tmp_path: Path) -> None:
    salt = object()
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        with pool.open(TEXT[:30], salt=salt) as session:
            logits_of(MODEL, session.cache, session.rest)
        pool.flush()
        assert not list(tmp_path.glob("*.kvcache"))
        assert pool.open(TEXT[:40], salt=salt).reused == 30


def test_a_file_that_is_too_long_hides_no_shorter_one(tmp_path: Path) -> None:
    for n in (30, 60):
        with make_session_pool(MODEL, folder=tmp_path) as pool:
            say(pool, TEXT[:n])
    with make_session_pool(MODEL, folder=tmp_path, capacity=40) as pool:
        assert pool.open(TEXT[:35]).reused == 30
        assert not pool.counts.rejected
    # It is still there for others.
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        assert pool.open(TEXT[:70]).reused == 60


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheFileError, match="file"):
        make_session_pool(MODEL, folder=tmp_path / "file")
    pool = make_session_pool(MODEL, folder=tmp_path / "a")
    say(pool, TEXT[:40])
    assert pool._disk is not None
    pool._disk.folder.close()
    # A conversation can go on without it.
    assert say(pool, TEXT[:50]) == 40
    assert say(pool, TEXT[100:120]) == 0
    # However often, and whatever it says: one key, and the newest of the errors.
    assert pool.counts.rejected.keys() == {"disk"} and "closed" in pool.counts.disk_error
    pool.close()


def test_without_a_folder_nothing_is_written() -> None:
    pool = make_session_pool(MODEL, max_stored=1)
    assert say(pool, TEXT[:40]) == 0
    pool.flush()
    pool.close()
    assert pool.counts.to_disk == 0


OTHER = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
from tests.plugin.serving.test_disk import TEXT, say, tiny_llama
from mlx_kvcache.plugin import make_session_pool
model = tiny_llama(head_dim=64)
with make_session_pool(model, folder=sys.argv[1]) as pool:
    print(say(pool, TEXT[:70], model))
"""


def test_other_processes_find_what_was_written(tmp_path: Path) -> None:
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        say(pool, TEXT[:50])
        pool.flush()
        done = subprocess.run(
            [sys.executable, "-c", OTHER, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == ("50\n", 0), done.stderr
        pool.clear()
        assert say(pool, TEXT[:80]) == 70


def test_a_pool_that_is_closed_twice(tmp_path: Path) -> None:
    pool: Any = make_session_pool(MODEL, folder=tmp_path)
    say(pool, TEXT[:30])
    pool.close()
    pool.close()
    assert isinstance(CacheFileError("a", "b"), CacheError)
    assert len(list(tmp_path.glob("*.kvcache"))) == 1


def test_what_cannot_be_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves memory all the same, and the conversation goes on."""
    with make_session_pool(MODEL, max_stored=1, folder=tmp_path) as pool:

        def full(*_: object) -> NoReturn:
            raise CacheFileError(tmp_path, "no space left")

        monkeypatch.setattr(pool._disk, "put", full)
        say(pool, TEXT[:20])
        say(pool, TEXT[40:60])
        assert (len(pool), pool.counts.to_disk) == (1, 0)
        assert pool.counts.rejected.keys() == {"disk"} and "no space left" in pool.counts.disk_error
        assert say(pool, TEXT[:20]) == 0


@pytest.mark.parametrize("method", ["put", "pop"])
def test_a_tree_that_fails_is_grown_anew(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been stored, or given up; what else is stored is found."""
    pool = make_session_pool(MODEL, max_stored=2)
    say(pool, TEXT[:20])
    say(pool, TEXT[40:60])
    with monkeypatch.context() as patched:
        original = getattr(PrefixTree, method)

        def late(self: PrefixTree[Any], *given: Any) -> NoReturn:
            original(self, *given)
            patched.undo()
            raise Planted

        patched.setattr(PrefixTree, method, late)
        with pytest.raises(Planted):
            say(pool, TEXT[80:100])
    assert say(pool, TEXT[40:65]) == 20
    assert say(pool, TEXT[80:100]) == (19 if method == "pop" else 0)
    assert len(pool) == 2
