"""Saves a quantized conversation and continues it in a cache with another capacity."""

import tempfile
from pathlib import Path

import mlx_lm

from examples import smollm2
from mlx_kvcache.persist.show import shown
from mlx_kvcache.plugin import PromptCache, make_prompt_cache

model, tokenizer = smollm2.load()


def said(cache: PromptCache, tokens: list[int], message: str) -> list[int]:
    """Run another turn, computing only the new tokens. Returns all tokens."""
    turn = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    new: list[int] = tokenizer.encode(turn, add_special_tokens=False)
    rest = (tokens + new)[cache.position :]
    parts = list(mlx_lm.stream_generate(model, tokenizer, rest, max_tokens=16, prompt_cache=cache))
    print(f"{message}\n  {''.join(part.text for part in parts)}")
    print(f"  {len(rest)} tokens computed, K and V in {cache.nbytes / 1e6:.2f} MB")
    return (tokens + new + [part.token for part in parts])[: cache.position]


today = make_prompt_cache(model, kv_bits=(8, 6))
tokens = said(today, [], "What is the capital of Italy?")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "chat.safetensors"
    today.save(file, tokens=tokens, tokenizer=tokenizer)
    print("\n".join(shown(file)))
    tomorrow = PromptCache.load(file, model, tokenizer, capacity=2048)

said(tomorrow, tomorrow.tokens or [], "And what is the capital of France?")
