"""Watches which caches mlx-vlm's tools use, and gives them inputs without a processor of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.generate import dispatch, stream_generate
from mlx_vlm.generate.ar import BatchGenerator

from mlx_kvcache.plugin.forward.batch_rows import Rows
from tests.plugin.serving.mlx_vlm_models import pictures_of


class Call(NamedTuple):
    """A call of the model on this package's caches."""

    rows: int
    columns: int
    is_batch: bool
    is_quantized: bool


@contextmanager
def watched() -> Iterator[list[Call]]:
    """The calls of models on this package's caches."""
    calls: list[Call] = []
    original = Rows.run

    def run(self: Rows, model: Any, call: Any, args: Any, kwargs: Any) -> Any:
        columns, is_quantized = self._length(args, kwargs), self.pool.quantization is not None
        calls.append(Call(len(self.conversations), columns, self.is_batch, is_quantized))
        return original(self, model, call, args, kwargs)

    with patch.object(Rows, "run", run):
        yield calls


class Reply(NamedTuple):
    tokens: list[int]
    cached: int


def replied(model: nn.Module, processor: Any, tokens: Sequence[int], *pictures: int, **options: Any) -> Reply:
    """The greedy reply of 8 tokens to a prompt with random pictures, and how many tokens were cached."""
    inputs: Mapping[str, Any] = {
        "input_ids": mx.array([tokens]),
        "attention_mask": mx.ones((1, len(tokens)), mx.int32),
        **pictures_of(model, *pictures),
    }
    with patch.object(dispatch, "prepare_inputs", lambda *_, **__: dict(inputs)):
        results = list(stream_generate(model, processor, "", **{"max_tokens": 8, **options}))
    return Reply(results[-1].token_ids or [], results[-1].cached_tokens)


class Generating:
    """A `BatchGenerator`, and the replies so far."""

    def __init__(self, model: nn.Module, processor: Any, **options: Any) -> None:
        self._model = model
        self.generator = BatchGenerator(model.language_model, processor, stop_tokens=set(), **options)
        self.replies: dict[int, list[int]] = {}

    def insert(
        self,
        *prompts: list[int],
        pictures: Sequence[Sequence[int]] = (),
        salt: int | None = None,
        **more: Any,
    ) -> list[int]:
        """Add prompts, each with random pictures. A `salt` stands for what mlx-vlm's server hashes."""
        inputs = []
        for index, tokens in enumerate(prompts):
            media = pictures_of(self._model, *(pictures[index] if pictures else ()))
            features = self._model.get_input_embeddings(mx.array([tokens]), **media).to_dict()
            inputs.append({name: value for name, value in features.items() if value is not None})
            if salt is not None:
                inputs[-1]["_apc_semantic_hash"] = salt
        uids: list[int] = self.generator.insert(list(prompts), prompt_kwargs=inputs, **more)
        return uids

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            for response in self.generator.next()[1]:
                self.replies.setdefault(response.uid, []).append(response.token)

    def finish(self) -> dict[int, list[int]]:
        while self.generator.has_work:
            self.step()
        self.generator.close()
        return self.replies
