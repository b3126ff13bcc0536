"""Forks mlx-lm prompt caches: two answers to one prompt with one prefill."""

import mlx_lm

from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache

model, tokenizer = smollm2.load()
question = [{"role": "user", "content": "Name a fruit."}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)

cache = make_prompt_cache(model)
mlx_lm.generate(model, tokenizer, prompt, max_tokens=1, prompt_cache=cache)
cache.rewind_to(len(prompt) - 1)
branch = cache.fork()
print(f"{cache.position} tokens read once; both branches hold {cache.pool.nbytes / 1e6:.1f} MB")

for name, own in (("first", cache), ("second", branch)):
    opening = tokenizer.encode({"first": "A", "second": "One"}[name], add_special_tokens=False)
    answer = mlx_lm.generate(model, tokenizer, prompt[-1:] + opening, max_tokens=12, prompt_cache=own)
    print(f"{name}: {tokenizer.decode(opening)}{answer}")
