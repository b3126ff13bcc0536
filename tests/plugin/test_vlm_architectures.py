"""Every language model of mlx-vlm that can be built: logits equal those of mlx-vlm's own caches.

What those cannot do, such as going back after a window has slid, is compared with the same model
computing the text that remains afresh.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.models.cache import ArraysCache, KVCache
from mlx_vlm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.configurations import KINDS, chosen
from tests.plugin.configurations.vlm import (
    VLM_CONFIGURATIONS,
    VLM_DIFFERS_IN_BLOCKS,
    VLM_STAY_NARROW,
    build_language_model,
)
from tests.plugin.forgetful import Forgetful
from tests.plugin.running import difference

pytestmark = pytest.mark.usefixtures("without_compiling")
REFUSED = {
    "deepseek_v4": "PoolingCache",
    "deepseek_v41": "DeepseekV41Cache",
    "glm5_next": "PoolingCache",
    "hy_v4": "HyV4KVCache",
    "minimax_m3_vl": "MiniMaxM3KVCache",
    "qwen4_exp": "QSAKVCache",
    "unlimited_ocr": "RingSlidingKVCache",
    "z1t": "Z1TCache",
}
"""Models with classes of caches of their own, which do more than keep keys and values."""
NAMES = [name for name in VLM_CONFIGURATIONS if name not in REFUSED]
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]
OTHER = [88 - token for token in TEXT]
EXACT = 1e-4
"""In units of the logits' standard deviation."""


def run(model: nn.Module, cache: list[Any], tokens: list[int], *sizes: int) -> mx.array:
    """Logits (len(tokens), vocabulary) of tokens fed in blocks of these sizes, and then one by one."""
    parts, left = [], list(tokens)
    for size in (*sizes, *[1] * len(tokens)):
        if left:
            parts.append(model(mx.array([left[:size]]), cache=cache).logits[0])
            mx.eval(parts[-1])
            left = left[size:]
    return mx.concatenate(parts)


def theirs(model: nn.Module, name: str, tokens: list[int], block: int) -> mx.array:
    """Logits by mlx-vlm's own caches: a block, then token by token, which is exact everywhere."""
    # Some models keep the positions of the last text.
    for kept in ("_rope_deltas", "_position_ids"):
        if hasattr(model, kept):
            setattr(model, kept, None)
    return run(model, make_theirs(model), tokens, 1 if name in VLM_DIFFERS_IN_BLOCKS else block)


def assert_equal(ours: mx.array, expected: mx.array) -> None:
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


SOME = [
    "cohere_compass",
    "falcon_perception",
    "flint",
    "glm4v",
    "hrm_text",
    "hunyuan_vl",
    "inkling",
    "lfm2_vl",
    "limite",
    "llava",
    "longcat_flash_sparse",
    "mimo_v2",
    "mllama",
    "molmo",
    "nemotron_h_nano_omni",
    "paligemma",
    "plamo2vl",
    "qwen2_5_vl",
    "qwen3_5_text",
    "xing4_0",
    "zaya1_vl",
]
"""One of each kind of those that mlx-lm does not have. Those of the same name are written as in mlx-lm."""


@pytest.mark.parametrize("name", chosen(NAMES, [*SOME, *(name for name in KINDS if name in NAMES)]))
def test_one_conversation_and_a_batch(name: str) -> None:
    """Blocks past every border, going back, two ways on, and rows of unequal lengths together."""
    model = build_language_model(name)
    cache = make_prompt_cache(model)
    sizes = () if name in VLM_DIFFERS_IN_BLOCKS else (5, 13, 1, 7)
    assert_equal(run(model, cache, TEXT[:32], *sizes), theirs(model, name, TEXT[:32], 24))
    cache.rewind_to(0)
    run(model, cache, TEXT[:23], *sizes[:2])
    point = cache.resume_point(20)
    assert point == 20 or (cache.pool.layout.is_recurrent and point > 0)
    cache.rewind_to(point)
    fork = cache.fork()
    text = TEXT[:point] + OTHER[:9]
    assert_equal(run(model, cache, OTHER[:9], *sizes[:1]), theirs(model, name, text, point)[point:])
    rows = [fork, make_prompt_cache(model)]
    run(model, rows[1], OTHER[:6], *sizes[:1])
    batch = [own.merge([own, other]) for own, other in zip(*rows, strict=True)]
    found = [model(mx.array([[TEXT[40 + i]], [OTHER[40 + i]]]), cache=batch).logits for i in range(3)]
    for row, before in enumerate((TEXT[:point], OTHER[:6])):
        more = [(TEXT, OTHER)[row][40 + i] for i in range(3)]
        expected = theirs(model, name, before + more, len(before))[len(before) :]
        assert_equal(mx.concatenate([own[row] for own in found]), expected)


@pytest.mark.parametrize("name", chosen(NAMES, SOME))
def test_forgetting_and_fewer_bits(name: str) -> None:
    """Keys and values in 8 bits, a full cache that shifts, and a removal of the oldest tokens."""
    model = build_language_model(name, is_wide=name not in VLM_STAY_NARROW)
    sizes = () if name in VLM_DIFFERS_IN_BLOCKS else (5, 13, 1, 7)
    cache = make_prompt_cache(model, rewind=32)
    expected = run(model, cache, TEXT[:32], *sizes)
    if name not in VLM_STAY_NARROW and any(leaf.rule for leaf in cache.pool.leaves):
        packed = make_prompt_cache(model, kv_bits=8, kv_group_size=32)
        error = mx.abs(run(model, packed, TEXT[:32], *sizes) - expected).max(axis=-1)
        # Of most tokens: a rounded key may send a token to another expert.
        assert mx.median(error) <= 0.5 * mx.std(expected)
        assert packed.nbytes < cache.nbytes
    if refusal := cache.pool.scheme.refusal:
        with pytest.raises(NotSupportedError, match=re.escape(refusal)):
            cache.remove(0, 9, recurrent="keep")
        assert cache.position == 32
        return
    shifted = make_prompt_cache(model, capacity=24, overflow="shift")
    run(model, shifted, TEXT[:32], *sizes)
    assert shifted.position <= 24 and shifted.gaps
    cache.remove(0, 9, recurrent="keep")
    assert cache.position == 23
    theirs = make_theirs(model)
    if cache.pool.scheme.ahead and all(type(own) in (KVCache, ArraysCache) for own in theirs):
        reference = [Forgetful() if type(own) is KVCache else own for own in theirs]
        for own in ("_rope_deltas", "_position_ids"):
            if hasattr(model, own):
                setattr(model, own, None)
        run(model, reference, TEXT[:32], *sizes)
        for each in reference:
            if isinstance(each, Forgetful):
                each.forget(9)
        assert_equal(run(model, cache, OTHER[:6], *sizes[:1]), run(model, reference, OTHER[:6], *sizes[:1]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        NotSupportedError, match=f"layer .* of mlx_vlm.models.{name}.language uses .*{REFUSED[name]}"
    ):
        make_prompt_cache(build_language_model(name))
