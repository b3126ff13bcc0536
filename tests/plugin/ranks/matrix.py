"""Architectures of mlx-lm that can be split, one after the other."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.configurations import CONFIGURATIONS, build
from tests.plugin.ranks.setting import Pair, Setting, split

TOLERANCE = 2e-4
"""Of the spread of logits. Experts are chosen by numbers that differ in their last bits."""


CANNOT = {
    "bailing_hybrid/pipeline": "its groups of layers leave the second rank none of two",
    "deepseek_v41/tensor": "caches by a class of its own, which no cache of this package answers",
    "deepseek_v41/pipeline": "caches by a class of its own, which no cache of this package answers",
    "prism_hadamard_qwen35/tensor": "halves of its weights are narrower than a group of its quantization",
    "step3p5/tensor": "its one head of keys cannot be halved",
}
"""What of the small configurations is not for two ranks, and why."""


def ways(model: nn.Module) -> list[str]:
    """How a model can be split."""
    found = ["tensor"] if hasattr(model, "shard") else []
    return [*found, "pipeline"] if hasattr(getattr(model, "model", None), "pipeline") else found


def splittable() -> list[str]:
    """All configurations with each way to split them, as arguments of `architecture`."""
    found = [f"{name}/{way}" for name in sorted(CONFIGURATIONS) for way in ways(build(name))]
    assert {name for name in CANNOT if name.partition("/")[0] in CONFIGURATIONS} <= set(found)
    return [name for name in found if name not in CANNOT]


def architecture(setting: Setting, name: str) -> None:
    """Blocks, steps, and every edit that the model can take."""
    which, _, way = name.rpartition("/")
    # Biases are drawn around what the model has made, which differs from process to process.
    mx.random.seed(0)
    whole = build(which)
    part = split(copy.deepcopy(whole), way, setting.group)
    pair = Pair(whole, part, make_prompt_cache(whole), make_prompt_cache(part, group=setting.group), 0.0)
    pair.tolerance = TOLERANCE * mx.sqrt(mx.var(whole(mx.array([[1, 2, 3]])))).item()  # type: ignore[assignment]
    pair.feed(list(range(3, 23)))
    pair.feed([5])
    point = pair.cache.resume_point(18)
    assert point == pair.whole.resume_point(18)
    pair.whole.rewind_to(point)
    pair.cache.rewind_to(point)
    branch = pair.fork()
    branch.feed([7, 8, 9])
    pair.feed([10])
    begin, end = (min(position, pair.whole.position) for position in (2, 4))
    try:
        pair.whole.remove(begin, end)
    except NotSupportedError:
        try:
            pair.cache.remove(begin, end)
        except NotSupportedError:
            return
        raise AssertionError("one process refuses to remove, ranks do not") from None
    pair.cache.remove(begin, end)
    pair.feed([11])
    branch.feed([12])
