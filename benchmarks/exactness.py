"""How far SmolLM2's logits are from those with mlx-lm's KVCache."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator

import mlx.core as mx

from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of, plain, without


def run() -> Iterator[str]:
    """Largest difference of SmolLM2's float32 logits from those with mlx-lm's KVCache."""
    model, tokenizer = smollm2.load(mx.float32)
    text = tokenizer.encode(pydoc_data.topics.topics["try"])[:160]
    prompt, more = text[:128], text[128:]

    def peer(prompt_tokens: list[int]):
        cache = plain(model)
        return cache, logits_of(model, cache, prompt_tokens)

    theirs, expected = peer(prompt)
    following = logits_of(model, theirs, more, 1)
    for block in (128, 50, 16):
        ours = make_prompt_cache(model)
        prefill = difference(logits_of(model, ours, prompt, block), expected)
        decoding = difference(logits_of(model, ours, more, 1), following)
        yield f"prefill of 128 tokens by {block:3}: {prefill:.1e}, then 32 single tokens: {decoding:.1e}"
    ours.rewind(40)
    again = logits_of(model, ours, text[120:136])
    rest = mx.concatenate([expected[120:], following[:8]])
    yield f"after rewind(40), 16 tokens: {difference(again, rest):.1e}"
    ours.rewind_to(128)
    branch = ours.fork()
    other = text[30:46]
    theirs, _ = peer(prompt)
    branched = difference(logits_of(model, branch, other, 1), logits_of(model, theirs, other, 1))
    origin = difference(logits_of(model, ours, more[:16], 1), following[:16])
    yield f"after fork, 16 single tokens in the branch: {branched:.1e}, in the origin: {origin:.1e}"
    for begin, end in ((4, 64), (60, 61), (0, 32)):
        ours.rewind_to(0)
        logits_of(model, ours, prompt)
        ours.remove(begin, end)
        theirs = without(peer(prompt)[0], begin, end, 64, 100000.0, traditional=True)
        moved = difference(logits_of(model, ours, more[:16], 1), logits_of(model, theirs, more[:16], 1))
        yield f"after remove({begin}, {end}), 16 single tokens against keys rotated by hand: {moved:.1e}"
