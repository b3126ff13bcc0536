"""Conversations that are there tomorrow: saving and loading beside prefilling again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import mlx.core as mx

from benchmarks.measure import timed
from benchmarks.text import topics
from examples import smollm2
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.running import difference

TOKENS, BLOCK, ROUNDS = 4000, 256, 5


def run() -> Iterator[str]:
    """Save, load and one token of a 4,000-token conversation of SmolLM2, beside prefilling it."""
    model, tokenizer = smollm2.load(mx.float32)
    text = topics(tokenizer, TOKENS + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.safetensors"
        for bits in (None, 8):
            yield _compared(model, tokenizer, text, path, bits)


def _compared(model, tokenizer, text, path, bits) -> str:
    token = mx.array([text[TOKENS:]])
    cache = make_prompt_cache(model, kv_bits=bits)
    prefill = timed(lambda: _read(model, cache, text[:TOKENS]))
    save = median(timed(lambda: cache.save(path, text[:TOKENS], tokenizer)) for _ in range(ROUNDS))
    expected = model(token, cache=cache)
    mx.eval(expected)
    loads: dict[bool, list[float]] = {True: [], False: []}
    for verify in [True, False] * ROUNDS:
        found: list[mx.array] = []
        loads[verify].append(timed(lambda: found.append(_loaded(model, tokenizer, path, token, verify))))  # noqa: B023
        assert difference(found[0], expected) == 0, "other logits"
    verified, lazy = median(loads[True]), median(loads[False])
    return (
        f"{bits or 32} bits: prefill {prefill:.1f} s; saved in {save:.2f} s "
        f"({path.stat().st_size / 1e6:.1f} MB), loaded and the next token in {verified:.2f} s "
        f"({lazy:.2f} s without verifying), equal logits; "
        f"prefill takes {prefill / (save + verified):.0f} times as long as both"
    )


def _read(model, cache, text) -> None:
    for start in range(0, len(text), BLOCK):
        mx.eval(model(mx.array([text[start : start + BLOCK]]), cache=cache))


def _loaded(model, tokenizer, path, token, verify) -> mx.array:
    cache = PromptCache.load(path, model, tokenizer, verify=verify)
    logits: mx.array = model(token, cache=cache)
    mx.eval(logits)
    return logits
