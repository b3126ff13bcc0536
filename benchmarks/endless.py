"""Measures the loss by position on a long text, with a capacity of 1,024 tokens and without a bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from benchmarks.rows import Curve, Row, less
from benchmarks.setting import Setting
from benchmarks.text import losses, topics
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, BLOCK, ROOM, SINKS = 16384, 256, 1024, 4
TRAINED = 8192
"""The context length, in tokens, that SmolLM2 was trained on."""
BIN = 1024


def run(setting: Setting) -> Iterator[Row | Curve]:
    """Loss on 16,384 tokens of English, capacity 1,024, against full attention and RotatingKVCache."""
    model, tokenizer = setting.load("smollm2")
    text = topics(tokenizer, TOKENS + 1)
    peer = f"RotatingKVCache({ROOM}, keep={SINKS})"
    ways = {
        "shift": make_prompt_cache(model, ROOM, "shift", sinks=SINKS),
        "window": _windowed(model),
        peer: [RotatingKVCache(ROOM, keep=SINKS) for _ in model.layers],
        "full attention": [KVCache() for _ in model.layers],
    }
    if streaming := _streaming(model):
        ways["VeloxQuant-MLX's StreamingLLM"] = streaming
    found = {name: losses(model, cache, text, BLOCK, name) for name, cache in ways.items()}
    again = losses(model, [KVCache() for _ in model.layers], text[TRAINED:], BLOCK, "begun again")

    full = found["full attention"][:TRAINED].mean()
    for name, loss in found.items():
        if name != "full attention":
            key, work = f"endless.below.{name}", f"mean loss below position {TRAINED:,}, {_shown(name)}"
            yield less(key, work, "nats", loss[:TRAINED].mean(), "full attention", full)
    for name, loss in found.items():
        # The second half is other text, so its reference is full attention that starts there.
        key, work = f"endless.after.{name}", f"the same from there to {TOKENS:,}, {_shown(name)}"
        yield less(key, work, "nats", loss[TRAINED:].mean(), "full attention begun there", again.mean())
    yield Curve(
        "endless",
        f"SmolLM2 on {TOKENS:,} tokens of English",
        "position",
        f"loss in nats, mean of {BIN:,} tokens",
        [start + BIN / 2 for start in range(0, TOKENS, BIN)],
        {_shown(name): _binned(loss) for name, loss in found.items()},
    )


def _shown(name: str) -> str:
    ours = {
        "shift": f"here, capacity={ROOM}, overflow='shift', sinks={SINKS}",
        "window": f"here, a window of {ROOM} with {SINKS} sinks",
    }
    return ours.get(name, name)


def _windowed(model: Any) -> Any:
    """Make this package's cache for a model that asks for `RotatingKVCache`."""
    model.make_cache = lambda: [RotatingKVCache(ROOM, keep=SINKS) for _ in model.layers]
    try:
        return make_prompt_cache(model)
    finally:
        del model.make_cache


def _streaming(model: Any) -> Any:
    """Make VeloxQuant-MLX's window with sinks; None if the package is not installed."""
    try:
        from veloxquant_mlx import KVCacheBuilder, KVCacheConfig
    except ImportError:
        return None
    config = KVCacheConfig(method="streaming_llm", stream_n_sink=SINKS, stream_window_size=ROOM - SINKS)
    return KVCacheBuilder.for_model(model, config)


def _binned(loss: np.ndarray) -> list[float]:
    return [float(loss[start : start + BIN].mean()) for start in range(0, TOKENS, BIN)]
