"""Folders in which files rely on others for their first tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import mlx.core as mx
import pytest

from mlx_kvcache.persist import disk_cache, schema
from mlx_kvcache.persist.container import read_contents
from mlx_kvcache.persist.files import base_of
from mlx_kvcache.plugin import make_session_pool
from mlx_kvcache.sessions import SessionPool
from tests.plugin.running import difference, logits_of, model_of
from tests.plugin.serving.test_disk import MODEL, say

TEXT = [Random(3).randrange(90) for _ in range(20)] + [(7 * i + i * i) % 90 for i in range(180)]


@pytest.fixture(autouse=True)
def short_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "SHARED", 16)
    monkeypatch.setattr(schema, "CHUNK", 16)


def branches(count: int, shared: int = 120) -> list[list[int]]:
    return [[*TEXT[:shared], *Random(seed).choices(range(90), k=40)] for seed in range(count)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kvcache"))


def bases(folder: Path) -> dict[str, str]:
    found = {path.name: base_of(read_contents(path).header) for path in files(folder)}
    return {name: base.name for name, base in found.items() if base}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_branches_on_one_prefix_store_it_once(name: str, tmp_path: Path) -> None:
    model, prompts = model_of(name), branches(3)
    with make_session_pool(model, folder=tmp_path) as pool:
        for prompt in prompts:
            say(pool, prompt, model)
    assert len(files(tmp_path)) == 3 and len(bases(tmp_path)) == 2
    with make_session_pool(model, folder=tmp_path) as pool:
        assert min(say(pool, [*prompt, 1, 2], model) for prompt in prompts) > 100


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"kv_bits": 8, "quantize_after": 60}], ids=str)
def test_packed_files_share_too(options: dict[str, int], tmp_path: Path) -> None:
    with make_session_pool(MODEL, folder=tmp_path, **options) as pool:
        replies = {tuple(prompt): logits(pool, prompt) for prompt in branches(3)}
    assert len(bases(tmp_path)) == 2
    with make_session_pool(MODEL, folder=tmp_path, **options) as pool:
        for prompt, expected in replies.items():
            with pool.open([*prompt]) as session:
                found = logits_of(MODEL, session.cache, session.rest)[-1]
                assert session.reused == len(prompt) - 1
                assert difference(found, expected) <= 0.2


def logits(pool: SessionPool, prompt: list[int]) -> mx.array:
    with pool.open(prompt) as session:
        return logits_of(MODEL, session.cache, session.rest)[-1]


def test_a_conversation_that_goes_on_is_a_chain(tmp_path: Path) -> None:
    sizes = []
    with make_session_pool(MODEL, max_stored=1, folder=tmp_path) as pool:
        for end in range(40, 160, 20):
            say(pool, [*TEXT[:end], end % 7])
            pool.flush()
            sizes.append(sum(path.stat().st_size for path in files(tmp_path)))
    # Each turn adds about as much as it has new tokens.
    steps = [b - a for a, b in pairwise(sizes)]
    assert max(steps) < 1.5 * min(steps)
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        assert say(pool, [*TEXT[:140], 0, 5, 5]) == 141


def test_a_chain_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "LONGEST", 3)
    with make_session_pool(MODEL, max_stored=1, folder=tmp_path) as pool:
        for end in range(40, 160, 20):
            say(pool, [*TEXT[:end], end % 7])
            pool.flush()
    parents = bases(tmp_path)

    def depth(name: str) -> int:
        return 1 + depth(parents[name]) if name in parents else 1

    assert max(depth(path.name) for path in files(tmp_path)) == 3


def test_eviction_takes_branches_before_their_base(tmp_path: Path) -> None:
    prompts = branches(6)
    with make_session_pool(MODEL, folder=tmp_path / "all") as pool:
        for prompt in prompts[:3]:
            say(pool, prompt)
    size = sum(path.stat().st_size for path in files(tmp_path / "all"))
    with make_session_pool(MODEL, max_stored=1, folder=tmp_path / "some", folder_bytes=size) as pool:
        for prompt in prompts:
            say(pool, prompt)
            pool.flush()
        assert pool._disk is not None and pool._disk.folder.counts["evicted"] > 0
    kept = {path.name for path in files(tmp_path / "some")}
    assert kept and set(bases(tmp_path / "some").values()) <= kept


def test_a_base_that_is_damaged_or_gone_is_a_miss(tmp_path: Path) -> None:
    prompts = branches(3)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-9])

    for damage in (Path.unlink, truncate):
        with make_session_pool(MODEL, folder=tmp_path) as pool:
            for prompt in prompts:
                say(pool, prompt)
        [base] = set(bases(tmp_path).values())
        damage(tmp_path / base)
        with make_session_pool(MODEL, folder=tmp_path) as pool:
            # The branches are not used without it, and what is computed then is right.
            assert say(pool, prompts[0]) == 0
            assert say(pool, prompts[1]) == 120


def test_of_a_base_only_the_first_tokens_are_read(tmp_path: Path) -> None:
    """A branch relies on 120 tokens, in chunks of 16: those before 128 are read, and checked."""
    prompts = branches(3)

    def damage(path: Path, run: int) -> None:
        content, entries = bytearray(path.read_bytes()), read_contents(path).entries
        content[entries[f"0.{run}.1.values"].begin] ^= 4
        path.write_bytes(content)

    for run, expected in ((8, 160), (7, 0)):
        with make_session_pool(MODEL, folder=tmp_path) as pool:
            for prompt in prompts:
                say(pool, prompt)
        damage(tmp_path / next(iter(bases(tmp_path).values())), run)
        with make_session_pool(MODEL, folder=tmp_path) as pool:
            assert say(pool, [*prompts[1], 5]) == expected
            assert pool.counts.rejected == {}


def test_conversations_at_other_positions_are_stored_whole(tmp_path: Path) -> None:
    with make_session_pool(MODEL, folder=tmp_path) as pool:
        say(pool, TEXT[:100])
        pool.flush()
        with pool.open([*TEXT[:100], 1, 2, 3]) as session:
            logits_of(MODEL, session.cache, session.rest)
            session.remove(30, 40, salt=None)
        assert not bases(tmp_path)
    assert not bases(tmp_path)
