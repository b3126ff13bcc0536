"""Measures what replies to short prompts notice of 8 bits: predictions, against a cache in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache
from tqdm import tqdm

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.text import divergences, log_probabilities, topics
from mlx_kvcache.plugin import make_prompt_cache

SIZES = ((5, 8), (15, 16), (30, 24), (60, 24), (120, 40))
"""The tokens of each prompt and of its reply."""

WAYS: dict[str, tuple[str, Callable[[Any, int], Any]]] = {
    "8": ("`kv_bits=8`", lambda model, _: make_prompt_cache(model, kv_bits=8)),
    "8.32": (
        "`kv_bits=8, kv_group_size=32`",
        lambda model, _: make_prompt_cache(model, kv_bits=8, kv_group_size=32),
    ),
    "8.after": (
        "`kv_bits=8, quantize_after=` the prompt's length",
        lambda model, prompt: make_prompt_cache(model, kv_bits=8, quantize_after=prompt),
    ),
    "8.values": ("`kv_bits=(None, 8)`", lambda model, _: make_prompt_cache(model, kv_bits=(None, 8))),
    "8.mlx-lm": (
        "mlx-lm's 8 bits from the start",
        lambda model, _: [QuantizedKVCache(64, 8) for _ in model.layers],
    ),
}
"""By key, what a reader calls a way to store 8 bits, and the cache of it for a prompt of so many tokens."""


def run(setting: Setting) -> Iterator[Row]:
    """What the predictions of SmolLM2's replies to five short prompts notice of 8 bits."""
    model, tokenizer = setting.load("smollm2")
    sizes = setting.of(SIZES, SIZES[:2])
    text = topics(tokenizer, sum(prompt for prompt, _ in sizes))
    prompts, expected, replies = list[list[int]](), list[mx.array](), list[list[int]]()
    for size, new in sizes:
        prompts.append(text[:size])
        text = text[size:]
        logs, reply = _predicted(model, make_prompt_cache(model), prompts[-1], new)
        expected.append(logs)
        replies.append(reply)
    for way, (name, make) in tqdm(WAYS.items(), unit="way", leave=False):
        first, later, apart, changed = [], [], [], 0
        for prompt, reply, wanted in zip(prompts, replies, expected, strict=True):
            logs, _ = _predicted(model, make(model, len(prompt)), prompt, len(reply), reply)
            change = np.array(mx.abs(logs - wanted).max(axis=-1))
            first.append(change[0])
            later.append(change[1:].max())
            apart.append(divergences(wanted[1:], logs[1:]).mean())
            changed += np.sum(np.array(logs.argmax(axis=-1) != wanted.argmax(axis=-1)))
        what = f"of a log probability from float's, {name}"
        yield Row(f"replies.first.{way}", f"largest change {what}, first token", "nats", float(max(first)))
        yield Row(f"replies.later.{way}", f"largest change {what}, later tokens", "nats", float(max(later)))
        mean = f"KL divergence from float, later tokens, the largest mean of a reply, {name}"
        yield Row(f"replies.divergence.{way}", mean, "nats", float(max(apart)))
        others = f"tokens of {sum(map(len, replies))} that are not the likeliest any more, {name}"
        yield Row(f"replies.changed.{way}", others, "", float(changed))


def _predicted(
    model: Any, cache: Any, prompt: list[int], n: int, reply: list[int] | None = None
) -> tuple[mx.array, list[int]]:
    """The log probabilities (n, vocabulary) of a reply's tokens, and the reply; None takes the likeliest."""
    found, given, tokens = list[mx.array](), prompt, list[int]()
    for index in range(n):
        found.append(log_probabilities(model(mx.array([given]), cache=cache)[0, -1:]))
        likeliest: Any = found[-1].argmax().item()
        tokens.append(reply[index] if reply else likeliest)
        given = tokens[-1:]
    return mx.concatenate(found), tokens
