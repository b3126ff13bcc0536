"""vllm-mlx's engines on attached models: the same tokens, of many requests at once that begin alike."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.utils import load

from mlx_kvcache.plugin import attach
from tests.plugin.configurations import build
from tests.plugin.running import greedy
from tests.plugin.serving.clients import attached

engine_core = pytest.importorskip("vllm_mlx.engine_core", reason="needs vllm-mlx", exc_type=ImportError)
batched = pytest.importorskip("vllm_mlx.engine.batched", exc_type=ImportError)
from vllm_mlx.request import SamplingParams  # noqa: E402
from vllm_mlx.scheduler import SchedulerConfig  # noqa: E402

TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(200)]
"""Longer than the 128 tokens from which on vllm-mlx stores a prompt."""
CACHES: dict[str, dict[str, Any]] = {
    "none": {"enable_prefix_cache": False},
    "memory-aware": {},
    "trie": {"use_memory_aware_cache": False},
    "paged": {"use_paged_cache": True, "paged_cache_block_size": 8},
    "chunked": {"chunked_prefill_tokens": 64},
}
"""Ways in which vllm-mlx stores prompts. The second is its default."""


@pytest.fixture(autouse=True)
def own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-mlx puts its thread's stream into mlx-lm, where other tests' threads cannot use it."""
    module: Any = importlib.import_module("mlx_lm.generate")
    monkeypatch.setattr(module, "generation_stream", module.generation_stream)


@cache
def model_of(name: str) -> nn.Module:
    return build(name)


@cache
def expected(name: str, prompt: tuple[int, ...], end: int) -> list[int]:
    """The reply on mlx-lm's own caches, up to the token that ends it."""
    tokens = greedy(model_of(name), list(prompt), 8)
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@contextmanager
def engine(model: nn.Module, tokenizer: Any, **options: Any) -> Iterator[Any]:
    config = engine_core.EngineConfig(scheduler_config=SchedulerConfig(**options))
    made = engine_core.EngineCore(model, tokenizer, config)
    try:
        yield made
    finally:
        made.close()


def replies(made: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    outputs = made.generate_batch_sync(prompts, SamplingParams(max_tokens=n, temperature=0.0, top_p=1.0))
    return [output.output_token_ids for output in outputs]


@pytest.mark.parametrize("way", CACHES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_eight_requests_that_begin_alike(name: str, way: str, tokenizer: Any) -> None:
    """In three rounds, of which the second shares a prefix with the first, and the third goes on from it."""
    model = model_of(name)
    endings = [[(5 * i + j) % 90 for j in range(3 + i)] for i in range(8)]
    with attach(model), engine(model, tokenizer, **CACHES[way]) as made:
        prompts = [TEXT[:140] + ending for ending in endings]
        for turn in range(3):
            found = replies(made, prompts, 8)
            assert found == [expected(name, tuple(prompt), tokenizer.eos_token_id) for prompt in prompts]
            if turn:
                prompts = [prompt + reply + [turn] for prompt, reply in zip(prompts, found, strict=True)]
            else:
                prompts = [TEXT[:150] + ending for ending in endings]
        if way == "trie":
            # Its entries are forks of ours. The others keep copies as mlx-lm's classes, which are not used.
            assert made.scheduler.get_stats()["prefix_cache"]["tokens_saved"] > 8 * 140


def test_the_engine_of_its_server(tiny: Path) -> None:
    """It loads the model itself, and generates in a thread of its own."""
    model, tokenizer = load(str(tiny))
    prompts = [f"{'word ' * 140} {i}" for i in range(8)]
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    alone = [greedy(model, prompt, 6) for prompt in tokens]

    async def generate() -> list[list[int]]:
        made = batched.BatchedEngine(
            str(tiny), scheduler_config=SchedulerConfig(use_memory_aware_cache=False)
        )
        await made.start()
        try:
            requests = (made.generate(prompt, max_tokens=6, temperature=0.0, top_p=1.0) for prompt in prompts)
            return [output.tokens for output in await asyncio.gather(*requests)]
        finally:
            await made.stop()

    with attached({}):
        assert asyncio.run(generate()) == alone
        assert asyncio.run(generate()) == alone
