"""Every architecture of mlx-lm that can be built: logits equal those of mlx-lm's own caches.

What those cannot do, such as going back after a window has slid, is compared with mlx-lm
computing the text that remains afresh.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache, trial
from tests.plugin.configurations import CONFIGURATIONS, DIFFERS_IN_BLOCKS, build
from tests.plugin.running import difference, logits_of, model_of

REFUSED = {"deepseek_v41": "layer 0 of mlx_lm.models.deepseek_v41 uses .*LayerCache"}
NAMES = [name for name in CONFIGURATIONS if name not in REFUSED]
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]
OTHER = [88 - token for token in TEXT]
EXACT = 1e-4
"""In units of the logits' standard deviation."""


@lru_cache(maxsize=8)
def theirs(name: str, tokens: tuple[int, ...], block: int) -> mx.array:
    """Logits by mlx-lm's own caches: a block, then token by token, which is exact everywhere."""
    model = model_of(name)
    cache = make_theirs(model)
    first = 1 if name in DIFFERS_IN_BLOCKS else block
    return mx.concatenate(
        [logits_of(model, cache, list(tokens[:first])), logits_of(model, cache, list(tokens[first:]), 1)]
    )


def assert_equal(ours: mx.array, expected: mx.array) -> None:
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


def in_blocks(model: nn.Module, cache: list[Any], tokens: list[int], sizes: tuple[int, ...]) -> mx.array:
    parts = []
    for size in (*sizes, *[1] * len(tokens)):
        if tokens:
            parts.append(logits_of(model, cache, tokens[:size]))
            tokens = tokens[size:]
    return mx.concatenate(parts)


@pytest.mark.parametrize("sizes", [(24,), (5, 13, 1, 7, 3)], ids=["one block", "uneven blocks"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding(name: str, sizes: tuple[int, ...]) -> None:
    """Past every border of windows and chunks, which are of 8 tokens."""
    model = model_of(name)
    ours = in_blocks(model, make_prompt_cache(model), TEXT[:40], sizes)
    assert_equal(ours, theirs(name, tuple(TEXT[:40]), 24))


@pytest.mark.parametrize("name", NAMES)
def test_going_back_and_forking(name: str) -> None:
    """Three tokens back after 23, or to the newest checkpoint before; then two ways on."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    in_blocks(model, cache, TEXT[:23], (8, 7, 4))
    point = cache.resume_point(20)
    if not cache.pool.layout.is_recurrent:
        assert point == 20
    assert point > 0
    cache.rewind_to(point)
    fork = cache.fork()
    for each, tokens in ((cache, OTHER), (fork, TEXT[30:])):
        expected = theirs(name, tuple(TEXT[:point] + tokens[:12]), point)
        assert_equal(in_blocks(model, each, tokens[:12], (5,)), expected[point:])
    cache.rewind_to(0)
    assert_equal(in_blocks(model, cache, OTHER[:12], (9,)), theirs(name, tuple(OTHER[:12]), 9))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_unequal_length_in_one_batch(name: str) -> None:
    """Padded prompts in blocks, decoding, one row extracted, the others going on."""
    model = model_of(name)
    prompts, more = (TEXT[:17], TEXT[20:26], TEXT[30:41]), (OTHER[:4], OTHER[4:8], OTHER[8:12])
    batch = PromptProcessingBatch(
        model,
        [0, 1, 2],
        [make_prompt_cache(model) for _ in prompts],
        prefill_step_size=7,
        samplers=[None] * 3,
        logits_processors=[()] * 3,
    )
    batch.prompt([prompt[:3] for prompt in prompts])
    batch.prompt([prompt[3:] for prompt in prompts])
    found: list[list[mx.array]] = [[], [], []]

    def decode(step: int, rows: tuple[int, ...], cache: list[Any]) -> None:
        logits = model(mx.array([[more[row][step]] for row in rows]), cache=cache)
        for index, row in enumerate(rows):
            found[row].append(logits[index])

    for step in (0, 1):
        decode(step, (0, 1, 2), batch.prompt_cache)
    alone = batch.extract_cache(1)
    batch.filter([0, 2])
    for step in (2, 3):
        decode(step, (0, 2), batch.prompt_cache)
        decode(step, (1,), alone)
    for row, (prompt, tokens) in enumerate(zip(prompts, more, strict=True)):
        expected = theirs(name, tuple(prompt + tokens), len(prompt))[len(prompt) :]
        assert_equal(mx.concatenate(found[row]), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotSupportedError, match=REFUSED[name]):
        make_prompt_cache(model_of(name))


def test_batches_in_16_bits_may_differ_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exact the logits of a batch must be to be taken for those of its rows depends on their dtype."""
    monkeypatch.setattr(trial, "EXACT", -1.0)
    for dtype, way in ((mx.float32, "apart"), (mx.bfloat16, "ragged"), (mx.float16, "ragged")):
        model = build("llama")
        model.set_dtype(dtype)
        assert make_prompt_cache(model).pool.batching == way
