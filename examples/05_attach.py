"""Generates beyond a cache's capacity with mlx-lm's own functions on an attached model."""

import mlx_lm

from examples import smollm2
from mlx_kvcache.plugin import attach

model, tokenizer = smollm2.load()
prompt = tokenizer.encode("The history of tea begins")

with attach(model, capacity=32, overflow="shift", sinks=4):
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=48)
print(text)
