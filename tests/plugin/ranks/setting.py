"""A model on all ranks beside the same model in one process, and both with caches."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.running import difference
from tests.plugin.tiny import tiny_deepseek_v3, tiny_llama

TOLERANCE = {"tensor": 2e-5, "pipeline": 0.0}
"""A pipeline does on each rank just what one process does. Shards of a product are added up in another
order: a few times 2**-23 of logits that are about 1, for each of some ten sums."""


@dataclass
class Setting:
    """What every scenario is given.

    Attributes:
        group: of all ranks.
        folder: shared by them.
    """

    group: mx.distributed.Group
    folder: Path
    _models: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def is_last(self) -> bool:
        return self.rank == self.group.size() - 1

    def models(self, way: str) -> tuple[nn.Module, nn.Module]:
        """A whole model, and this rank's part of it."""
        if way not in self._models:
            whole = (
                tiny_llama(num_key_value_heads=4, num_hidden_layers=2)
                if way == "tensor"
                else tiny_deepseek_v3(num_hidden_layers=4)
            )
            self._models[way] = whole, split(copy.deepcopy(whole), way, self.group)
        return self._models[way]

    def pair(self, way: str, **options: Any) -> Pair:
        """Both models with empty caches."""
        whole, part = self.models(way)
        return Pair(
            whole,
            part,
            make_prompt_cache(whole, **options),
            make_prompt_cache(part, group=self.group, **options),
            TOLERANCE[way],
        )


def split(model: nn.Module, way: str, group: mx.distributed.Group) -> nn.Module:
    """This rank's heads or layers of a model, which is changed."""
    if way == "tensor":
        model.shard(group)
    else:
        model.model.pipeline(group)
    mx.eval(model.parameters())
    return model


@dataclass
class Pair:
    """A conversation in one process, and the same on all ranks."""

    whole_model: nn.Module
    model: nn.Module
    whole: PromptCache
    cache: PromptCache
    tolerance: float

    def feed(self, tokens: list[int]) -> None:
        """Both take tokens in, and give the same logits."""
        expected = self.whole_model(mx.array([tokens]), cache=self.whole)
        found = self.model(mx.array([tokens]), cache=self.cache)
        mx.eval(expected, found)
        worst = difference(found, expected)
        assert worst <= self.tolerance, f"logits differ by {worst} after {self.cache.position} tokens"
        assert self.cache.position == self.whole.position

    def fork(self) -> Pair:
        return Pair(self.whole_model, self.model, self.whole.fork(), self.cache.fork(), self.tolerance)
