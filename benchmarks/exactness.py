"""Compares a model's logits with those computed with mlx-lm's KVCache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.text import topics
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of, plain, without

READ, MORE = 128, 32


def run(setting: Setting) -> Iterator[Row]:
    """Largest difference of SmolLM2's float32 logits from those with mlx-lm's KVCache."""
    model, tokenizer = smollm2.load(mx.float32)
    text = topics(tokenizer, READ + MORE)
    prompt, more = text[:READ], text[READ:]
    theirs, expected = _peer(model, prompt)
    following = logits_of(model, theirs, more, 1)
    for block in setting.of((READ, 50, 16), (50,)):
        ours = make_prompt_cache(model)
        prefill = difference(logits_of(model, ours, prompt, block), expected)
        decoding = difference(logits_of(model, ours, more, 1), following)
        yield _row(f"prefill.{block}", f"prefill of {READ} tokens by {block}", prefill)
        yield _row(f"decode.{block}", f"then {MORE} single tokens", decoding)
    ours.rewind(40)
    again = logits_of(model, ours, text[READ - 8 : READ + 8])
    yield _row(
        "rewind", "after rewind(40)", difference(again, mx.concatenate([expected[-8:], following[:8]]))
    )
    ours.rewind_to(READ)
    branch, other = ours.fork(), text[30:46]
    branched = logits_of(model, _peer(model, prompt)[0], other, 1)
    yield _row("fork", "after fork, in the branch", difference(logits_of(model, branch, other, 1), branched))
    origin = difference(logits_of(model, ours, more[:16], 1), following[:16])
    yield _row("origin", "and in the origin", origin)
    for begin, end in setting.of(((4, 64), (60, 61), (0, 32)), ((4, 64),)):
        ours.rewind_to(0)
        logits_of(model, ours, prompt)
        ours.remove(begin, end)
        theirs = without(_peer(model, prompt)[0], begin, end, 64, 100000.0, traditional=True)
        moved = difference(logits_of(model, ours, more[:16], 1), logits_of(model, theirs, more[:16], 1))
        yield _row(f"remove.{begin}", f"after remove({begin}, {end}), beside keys rotated by hand", moved)


def _row(key: str, work: str, found: float) -> Row:
    return Row(f"exactness.{key}", work, "largest difference", found)


def _peer(model: Any, prompt: list[int]) -> tuple[Any, mx.array]:
    cache = plain(model)
    return cache, logits_of(model, cache, prompt)
