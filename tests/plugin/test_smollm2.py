"""A real model: logits through our caches against mlx-lm's, and against fresh computations."""

from __future__ import annotations

import copy
import pydoc_data.topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of, plain, without

LIMIT = 1e-4


@pytest.fixture(scope="module")
def text(chat_model: tuple[nn.Module, Any]) -> list[int]:
    """Real English, 96 tokens."""
    tokens: list[int] = chat_model[1].encode(pydoc_data.topics.topics["try"])
    return tokens[:96]


@pytest.fixture(scope="module")
def read(chat_model: tuple[nn.Module, Any], text: list[int]) -> tuple[list[Any], mx.array]:
    """mlx-lm's caches after 80 tokens in one block, to be copied, and the logits."""
    cache = plain(chat_model[0])
    return cache, logits_of(chat_model[0], cache, text[:80])


@pytest.fixture(scope="module")
def expected(
    chat_model: tuple[nn.Module, Any], text: list[int], read: tuple[list[Any], mx.array]
) -> tuple[mx.array, mx.array]:
    """mlx-lm's logits: 80 tokens in one block, then 16 one by one."""
    return read[1], logits_of(chat_model[0], copy.deepcopy(read[0]), text[80:], 1)


@pytest.mark.parametrize("block", [80, 33])
def test_prefill_and_decoding_equal_mlx_lm(
    chat_model: tuple[nn.Module, Any], text: list[int], expected: tuple[mx.array, mx.array], block: int
) -> None:
    cache = make_prompt_cache(chat_model[0])
    assert difference(logits_of(chat_model[0], cache, text[:80], block), expected[0]) <= LIMIT
    assert difference(logits_of(chat_model[0], cache, text[80:], 1), expected[1]) <= LIMIT
    assert cache.position == 96


def test_rewind_then_the_same_again(
    chat_model: tuple[nn.Module, Any], text: list[int], expected: tuple[mx.array, mx.array]
) -> None:
    cache = make_prompt_cache(chat_model[0])
    logits_of(chat_model[0], cache, text[:80])
    logits_of(chat_model[0], cache, text[:5], 1)
    cache.rewind(9)
    assert cache.position == 76
    again = logits_of(chat_model[0], cache, text[76:84])
    assert difference(again[:4], expected[0][76:]) <= LIMIT
    assert difference(again[4:], expected[1][:4]) <= LIMIT


def test_both_branches_of_a_fork(
    chat_model: tuple[nn.Module, Any],
    text: list[int],
    read: tuple[list[Any], mx.array],
    expected: tuple[mx.array, mx.array],
) -> None:
    model = chat_model[0]
    cache = make_prompt_cache(model)
    logits_of(model, cache, text[:80])
    fork = cache.fork()
    other = text[40:46]
    theirs = copy.deepcopy(read[0])
    for step in range(2):
        ours = logits_of(model, cache, text[80 + step : 81 + step])
        assert difference(ours, expected[1][step : step + 1]) <= LIMIT
        token = other[step : step + 1]
        assert difference(logits_of(model, fork, token), logits_of(model, theirs, token)) <= LIMIT


@pytest.mark.parametrize(("begin", "end"), [(4, 40), (0, 16)])
def test_removal_equals_keys_rotated_by_hand(
    chat_model: tuple[nn.Module, Any],
    text: list[int],
    read: tuple[list[Any], mx.array],
    begin: int,
    end: int,
) -> None:
    model, ours = chat_model[0], make_prompt_cache(chat_model[0])
    logits_of(model, ours, text[:80])
    ours.remove(begin, end)
    theirs = without(read[0], begin, end, 64, 100000.0, traditional=True)
    assert ours.position == 80 - (end - begin)
    assert difference(logits_of(model, ours, text[80:88]), logits_of(model, theirs, text[80:88])) <= LIMIT
    assert (
        difference(logits_of(model, ours, text[88:91], 1), logits_of(model, theirs, text[88:91], 1)) <= LIMIT
    )


def test_text_goes_on_when_the_capacity_overflows(chat_model: tuple[nn.Module, Any], text: list[int]) -> None:
    model = chat_model[0]
    cache = make_prompt_cache(model, capacity=48, overflow="shift", sinks=4)
    theirs = plain(model)
    for start in range(0, 96, 16):
        length = theirs[0].offset
        if length + 16 > 48:
            drop = max((length - 4) // 2, length + 16 - 48)
            theirs = without(theirs, 4, 4 + drop, 64, 100000.0, traditional=True)
        block = text[start : start + 16]
        assert difference(logits_of(model, cache, block), logits_of(model, theirs, block)) <= LIMIT
        assert cache.position == theirs[0].offset <= 48
