"""Measures the speed and memory of quantized keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache

from benchmarks.measure import EQUAL, check_equal, peak_of, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import Setting
from benchmarks.shape import read
from mlx_kvcache.plugin import make_prompt_cache

BLOCK = 256


def run(setting: Setting) -> Iterator[Row]:
    """One token in 8 and 4 bits against QuantizedKVCache and float, and peak bytes of a prefill."""
    model, _ = setting.load(setting.of("smollm2", "tiny"))
    prefill, rounds = setting.of(1024, 512), setting.of(16, 5)
    text = mx.random.randint(0, 500, (1, prefill), key=mx.random.key(0))
    yield held(
        "packed.peak",
        f"peak above the model of prefilling {prefill:,} by {BLOCK} in 8 bits",
        _peak(model, text, 8),
        "float here",
        _peak(model, text, None),
    )
    token = mx.array([[5]])
    plain = _filled(model, make_prompt_cache(model), text)
    for bits in (8, 4):
        ours = _filled(model, make_prompt_cache(model, kv_bits=bits), text)
        theirs = _filled(model, [QuantizedKVCache(64, bits) for _ in model.layers], text)
        # The two use scales of different precision, hence the wide tolerance.
        logits = model(token, cache=theirs)
        check_equal(model(token, cache=ours), logits, max(EQUAL[logits.dtype], 0.02 if bits == 8 else 0.5))
        for key, peer, cache in (
            (f"packed.{bits}", "QuantizedKVCache", theirs),
            (f"packed.{bits}.float", "float here", plain),
        ):
            yield speed(
                key,
                f"a token after {prefill:,} in {bits} bits",
                "ms",
                lambda: timed(lambda: mx.eval(model(token, cache=ours))),  # noqa: B023
                peer,
                lambda: timed(lambda: mx.eval(model(token, cache=cache))),  # noqa: B023
                rounds,
            )
        yield held(
            f"packed.{bits}.bytes",
            f"K and V of {prefill:,} tokens in {bits} bits",
            ours.nbytes,
            "QuantizedKVCache",
            sum(layer.nbytes for layer in theirs),
        )


def _peak(model: Any, text: mx.array, bits: int | None) -> int:
    """The peak bytes of a prefill by mlx-lm's generate_step."""
    cache = make_prompt_cache(model, kv_bits=bits)
    steps = generate_step(text[0], model, max_tokens=1, prompt_cache=cache, prefill_step_size=BLOCK)
    return peak_of(lambda: list(steps))


def _filled(model: Any, cache: Any, text: mx.array) -> Any:
    read(model, cache, text, BLOCK)
    return cache
