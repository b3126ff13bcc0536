"""Speed and peak memory of keys and values in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache

from benchmarks.measure import paired, timed
from benchmarks.text import topics
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache

PREFILL, BLOCK, ROUNDS = 1024, 256, 12


def run() -> Iterator[str]:
    """Peak bytes of a prefill in 8 bits beside float; a decode step beside mlx-lm's QuantizedKVCache."""
    model, tokenizer = smollm2.load(mx.float32)
    text = topics(tokenizer, PREFILL)
    peaks = {bits: _peak(model, text, bits) for bits in (None, 8)}
    yield (
        f"prefill of {PREFILL} by {BLOCK}: peak {peaks[8] / 1e6:.1f} MB above the model in 8 bits, "
        f"{peaks[None] / 1e6:.1f} MB in float, {peaks[8] / peaks[None]:.3f}"
    )
    ours = {bits: _filled(model, make_prompt_cache(model, kv_bits=bits), text) for bits in (None, 8, 4)}
    for bits in (8, 4):
        theirs = _filled(model, [QuantizedKVCache(64, bits) for _ in model.layers], text)

        def step(cache) -> float:
            return timed(lambda: mx.eval(model(mx.array([[5]]), cache=cache)))

        beside = paired(lambda: step(ours[bits]), lambda: step(theirs), ROUNDS, f"{bits} bits")  # noqa: B023
        yield (
            f"a token after {PREFILL} in {bits} bits: {1e3 * beside.ours:.1f} ms, QuantizedKVCache "
            f"{1e3 * beside.theirs:.1f} ms, time {beside} of theirs"
        )
        plain = paired(lambda: step(ours[bits]), lambda: step(ours[None]), ROUNDS, f"{bits} and float")  # noqa: B023
        yield f"  beside float here: time {plain}"


def _peak(model, text, bits) -> int:
    """Bytes above what was there, through mlx-lm's own loop."""
    cache = make_prompt_cache(model, kv_bits=bits)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in generate_step(mx.array(text), model, max_tokens=1, prompt_cache=cache, prefill_step_size=BLOCK):
        pass
    return mx.get_peak_memory() - before


def _filled(model, cache, text):
    for start in range(0, len(text), BLOCK):
        mx.eval(model(mx.array([text[start : start + BLOCK]]), cache=cache))
    return cache
