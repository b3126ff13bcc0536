"""The small configurations: complete, sound, and telling where mlx-lm contradicts itself."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from tests.plugin.configurations import (
    CONFIGURATIONS,
    DIFFERS_IN_BLOCKS,
    DIFFERS_WITHOUT_CACHE,
    KINDS,
    MISSING,
    UNBUILDABLE,
    VOCABULARY,
    build,
    chosen,
    model_modules,
    module_of,
)
from tests.plugin.running import deviation

TOKENS = [(7 * i + i * i + i // 7) % VOCABULARY for i in range(40)]
BLOCKS = [13, 5, 1, 1, 9, 2, 9]
# Relative to the standard deviation of the logits.
TOLERANCE = 1e-4


def run(model: nn.Module, rows: list[list[int]], blocks: list[int]) -> mx.array:
    """Logits of the rows, fed in blocks to mlx-lm's own caches."""
    cache = make_prompt_cache(model)
    parts = []
    begin = 0
    for size in blocks:
        parts.append(model(mx.array([row[begin : begin + size] for row in rows]), cache=cache))
        mx.eval(parts[-1])
        begin += size
    return mx.concatenate(parts, axis=1)


def test_every_model_module_has_its_place() -> None:
    configured = {module_of(name) for name in CONFIGURATIONS}
    assert not configured & set(UNBUILDABLE)
    assert sorted(configured | set(UNBUILDABLE)) == model_modules()
    assert set(DIFFERS_WITHOUT_CACHE) | set(DIFFERS_IN_BLOCKS) <= set(CONFIGURATIONS)
    assert set(KINDS) <= set(CONFIGURATIONS) | MISSING


# All of them are run on both kinds of caches, and compared, by test_architectures.py.
ALONE = sorted({*chosen(CONFIGURATIONS), *DIFFERS_WITHOUT_CACHE, *DIFFERS_IN_BLOCKS})


@pytest.mark.parametrize("name", ALONE)
def test_model_runs(name: str) -> None:
    model = build(name)
    whole = run(model, [TOKENS], [len(TOKENS)])
    assert whole.shape == (1, len(TOKENS), VOCABULARY)
    assert mx.isfinite(whole).all().item()
    spread = mx.sqrt(mx.var(whole, axis=-1))
    assert mx.all((spread > 0.1) & (spread < 10)).item()
    # Every position tells what came before: the last logits would change with the first token.
    other = run(model, [[TOKENS[0] + 1, *TOKENS[1:]]], [len(TOKENS)])
    assert deviation(whole[:, -1], other[:, -1]) > 10 * TOLERANCE

    uncached = model(mx.array([TOKENS]))
    assert uncached.shape == whole.shape
    assert mx.isfinite(uncached).all().item()
    assert (deviation(uncached, whole) < TOLERANCE) == (name not in DIFFERS_WITHOUT_CACHE)

    reverse = TOKENS[::-1]
    pair = run(model, [TOKENS, reverse], BLOCKS)
    expected = mx.concatenate([whole, run(model, [reverse], [len(TOKENS)])])
    assert (deviation(pair, expected) < TOLERANCE) == (name not in DIFFERS_IN_BLOCKS)


@pytest.mark.parametrize("name", ["kimi_linear", "llama", "qwen3_next"])
def test_weights_follow_from_the_seed(name: str) -> None:
    """Whatever state mlx's own generator is in."""

    def weights(seed: int) -> dict[str, mx.array]:
        return dict(tree_flatten(build(name, seed).parameters()))

    first, second, other = weights(0), weights(0), weights(1)
    assert all(mx.array_equal(first[path], second[path]) for path in first)
    assert not any(mx.array_equal(first[path], other[path]) for path in first)
