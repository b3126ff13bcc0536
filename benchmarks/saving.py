"""Measures saving and loading conversations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from benchmarks.measure import check_equal, once, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import Setting, two_layers
from benchmarks.shape import contiguous, fill, read, shape_of
from mlx_kvcache.plugin import PromptCache, make_prompt_cache, make_session_pool

BLOCK, ROUNDS = 256, 5


def run(setting: Setting) -> Iterator[Row]:
    """Saving and loading 4,000 tokens, against prefilling them and against mlx-lm's own files."""
    model, _ = setting.load(setting.of("smollm2", "tiny"))
    length = setting.of(4000, 1000)
    text = [(7 * i + i * i) % 400 + 100 for i in range(length)]
    with tempfile.TemporaryDirectory() as folder:
        yield from _prefilled(model, text, Path(folder) / "ours.safetensors")
        yield from _beside(model, text, Path(folder))
    yield from _on_one_prefix(setting.of(4096, 1024))


def _prefilled(model: Any, text: list[int], path: Path) -> Iterator[Row]:
    cache, token = make_prompt_cache(model), mx.array([[5]])
    prefill = timed(lambda: read(model, cache, mx.array([text]), BLOCK))
    for bits in (32, 8):
        if bits == 8:
            cache[0].to_quantized(64, 8)
        save = median(timed(lambda: cache.save(path, text)) for _ in range(ROUNDS))
        found: list[mx.array] = []
        load = median(
            timed(lambda: found.append(_next(model, PromptCache.load(path, model), token)))  # noqa: B023
            for _ in range(ROUNDS)
        )
        # A fork, so that the saved cache stays unchanged.
        check_equal(found[-1], _next(model, cache.fork(), token), 0)
        yield once(
            f"saving.{bits}",
            f"saving {len(text):,} tokens in {bits} bits, loading them with checksums compared, and a token",
            "s",
            save + load,
            "prefill",
            prefill,
        )
        yield Row(f"saving.{bits}.bytes", f"the file in {bits} bits", "MB", path.stat().st_size / 1e6)


def _beside(model: Any, text: list[int], folder: Path) -> Iterator[Row]:
    shape = shape_of(model)
    ours, theirs = fill(make_prompt_cache(model), len(text), shape=shape), contiguous(len(text), shape=shape)
    token = mx.array([[5]])
    mine, peer = folder / "mine.safetensors", str(folder / "peer.safetensors")
    yield speed(
        "saving.save",
        f"saving {len(text):,} tokens, checksummed and flushed to the disk here",
        "ms",
        lambda: timed(lambda: ours.save(mine, text)),
        "save_prompt_cache",
        lambda: timed(lambda: save_prompt_cache(peer, theirs)),
        ROUNDS,
    )
    check_equal(
        _next(model, PromptCache.load(mine, model), token), _next(model, load_prompt_cache(peer), token)
    )
    for key, work, verify in (
        ("saving.load", "loading them and a token, checksums compared", True),
        ("saving.load.lazy", "the same without comparing", False),
    ):
        yield speed(
            key,
            work,
            "ms",
            lambda: timed(lambda: _next(model, PromptCache.load(mine, model, verify=verify), token)),  # noqa: B023
            "load_prompt_cache",
            lambda: timed(lambda: _next(model, load_prompt_cache(peer), token)),
            ROUNDS,
        )
    yield held(
        "saving.bytes",
        "size of the file",
        mine.stat().st_size,
        "save_prompt_cache",
        Path(peer).stat().st_size,
    )


def _on_one_prefix(length: int) -> Iterator[Row]:
    """Store conversations whose first half is the same in a folder, and load one of them.

    The peer is a folder with the same conversations, each whole in its file: salts keep them apart.
    """
    model, count, half, token = two_layers(), 16, length // 2, mx.array([[5]])
    shape = shape_of(model)
    prefix = fill(make_prompt_cache(model), half, shape=shape)
    texts = [[*range(half), *range(10_000 * n, 10_000 * n + half)] for n in range(1, count + 1)]
    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as whole:
        for folder in (shared, whole):
            with make_session_pool(model, folder=folder) as pool:
                for text in texts:
                    salt = text[-1] if folder == whole else None
                    pool.store(text, fill(prefix.fork(), half, text[-1], shape=shape), salt)
        size = sum(path.stat().st_size for path in Path(shared).glob("*.kvcache"))
        distinct = prefix.nbytes * (count + 1)
        name = f"{count} conversations of {length:,} tokens in a folder, on a prefix of {half:,}"
        yield held("saving.shared.bytes", name, size, "distinct tokens", distinct)

        def reply(folder: str) -> mx.array:
            salt = texts[-1][-1] if folder == whole else None
            with (
                make_session_pool(model, folder=folder) as pool,
                pool.open([*texts[-1], 5], salt, store=False) as session,
            ):
                assert session.reused == length
                return _next(model, session.cache, token)

        check_equal(reply(shared), reply(whole), 0)
        yield speed(
            "saving.shared.load",
            "opening the folder, loading one of them, and a token",
            "ms",
            lambda: timed(lambda: reply(shared)),
            "whole files",
            lambda: timed(lambda: reply(whole)),
            4 * ROUNDS,
        )


def _next(model: Any, cache: Any, token: mx.array) -> mx.array:
    logits: mx.array = model(token, cache=cache)
    mx.eval(logits)
    return logits
