"""Recurrent layers go back to each of the newest `rewind` tokens, and forget what a removal takes out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.hosts.layout import layout_of
from tests.plugin.configurations import CONFIGURATIONS, build
from tests.plugin.running import difference, logits_of

REFUSED = {"deepseek_v41"}
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(150)]
EXACT = 1e-4
"""In units of the logits' standard deviation."""


@lru_cache(maxsize=2)
def model_of(name: str) -> nn.Module:
    return build(name)


def is_recurrent(name: str) -> bool:
    return name not in REFUSED and layout_of(model_of(name)).is_recurrent


RECURRENT = [name for name in CONFIGURATIONS if is_recurrent(name)]


@lru_cache(maxsize=2)
def theirs(name: str) -> mx.array:
    """Logits of all tokens of the text by mlx-lm's own caches, token by token after a block."""
    model = model_of(name)
    cache = make_theirs(model)
    return mx.concatenate([logits_of(model, cache, TEXT[:8]), logits_of(model, cache, TEXT[8:], 1)])


def assert_follows(name: str, cache: Any, begin: int, n: int = 8) -> None:
    """The next n tokens of the text have the logits of a fresh computation."""
    expected = theirs(name)[begin : begin + n]
    ours = logits_of(model_of(name), cache, TEXT[begin : begin + n])
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


@pytest.mark.parametrize("name", RECURRENT)
def test_every_architecture_can_be_replayed(name: str) -> None:
    cache = make_prompt_cache(model_of(name))
    recurrent = [leaf.index for leaf in cache.pool.leaves if leaf.rule is None]
    assert list(cache.pool.mixers) == recurrent


@pytest.mark.parametrize("name", RECURRENT)
def test_each_of_the_newest_64_tokens(name: str) -> None:
    """A block longer than `rewind`, a short block, and single tokens."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    for begin, end in ((0, 90), (90, 101)):
        logits_of(model, cache, TEXT[begin:end])
    logits_of(model, cache, TEXT[101:130], 1)
    for back in range(65):
        fork = cache.fork()
        assert fork.can_resume(130 - back)
        fork.rewind(back)
        assert_follows(name, fork, 130 - back)


@pytest.mark.parametrize("name", RECURRENT)
def test_again_and_again(name: str) -> None:
    """Back by all of eight tokens, ten times, in blocks and token by token, as speculative decoding does."""
    model = model_of(name)
    cache = make_prompt_cache(model, rewind=8)
    logits_of(model, cache, TEXT[:40])
    for turn in range(10):
        begin = cache.position
        logits_of(model, cache, [5] * 4 + [turn] * 4, 8 if turn % 2 else 1)
        cache.rewind(8)
        assert_follows(name, cache, begin, 5)
        cache.rewind(turn % 5)
    assert_follows(name, cache, cache.position)
