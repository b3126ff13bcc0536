"""What every entry answers after every token, in memory and in mlx-lm's files, and mlx-lm's own loop on it.

Windows and chunks are of 8 tokens. At the first token of a chunk nothing is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from tests.plugin.configurations import CONFIGURATIONS, chosen
from tests.plugin.running import difference, logits_of, model_of

NAMES = chosen(name for name in CONFIGURATIONS if name != "deepseek_v41")
KINDS = ["llama", "llama:window", "gemma3_text", "gpt_oss", "llama4", "deepseek_v3", "deepseek_v32"]
KINDS += ["falcon_h1"]
"""Full attention, windows, both, chunks, latents, several layers in one entry, and a recurrence beside."""
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]
BORDERS = (1, 7, 8, 9, 16, 17)
EXACT = 1e-4
"""In units of the logits' standard deviation."""


def leaves_of(entries: Any) -> Iterator[Any]:
    for entry in entries:
        yield from leaves_of(entry.caches) if hasattr(entry, "caches") else (entry,)


def assert_answers(cache: Any, position: int) -> None:
    """Each layer says that it has read `position` tokens, and gives as many as mlx-lm's would."""
    for entry in cache:
        assert entry.size() <= position and entry.empty() == (position == 0)
        assert (entry.nbytes > 0) >= any(array.size for _, array in arrays_of(entry.state))
        mx.eval(entry.state)
    for layer in leaves_of(cache):
        if not hasattr(layer, "keys"):
            continue
        keys, values, *numbers = layer.saved_state
        assert all(map(mx.array_equal, layer.state[:2], (keys, values))) if position else not numbers[0]
        assert position in numbers and bool(layer.nbytes) >= bool(layer.keys is not None)
        if not position:
            assert keys is values is layer.keys is layer.values is None
            continue
        stored = layer.keys_and_values()
        assert [array.shape for array in stored] == [keys.shape, values.shape]
        assert keys.shape[2] == values.shape[2] == held_of(layer, position)
        if layer.keys is not None:
            assert (layer.keys.shape[1], layer.keys.shape[3]) == (keys.shape[1], keys.shape[3])


def arrays_of(state: Any) -> list[tuple[str, Any]]:
    return [pair for pair in tree_flatten(state) if isinstance(pair[1], mx.array)]


def held_of(layer: Any, position: int) -> int:
    """How many tokens mlx-lm's class would keep: what the next token sees, and of a window one more."""
    if hasattr(layer, "chunk_size"):
        return position % int(layer.chunk_size)
    return min(position, int(layer.max_size)) if hasattr(layer, "max_size") else position


def assert_saved(model: nn.Module, cache: PromptCache, token: int, file: Path, bound: float = EXACT) -> None:
    """The next token's logits are the same after the way through mlx-lm's format, to either."""
    position = cache.position
    if MLX_LM.keeps_numbers_apart and any(getattr(layer, "start_position", 0) for layer in leaves_of(cache)):
        with pytest.raises(NotSupportedError, match="chunks that start at position 8: caches of this host"):
            cache.save(file, format="mlx-lm")
        return
    cache.save(file, format="mlx-lm")
    expected = logits_of(model, cache.fork(), [token])
    loaded = [load_prompt_cache(str(file))]
    if any(hasattr(layer, "keys") for layer in leaves_of(cache)):
        # Of recurrences alone mlx-lm does not write how many tokens they have read.
        loaded.append(PromptCache.load(file, model))
        assert_answers(loaded[1], position)
    for other in loaded:
        assert difference(logits_of(model, other, [token]), expected) <= bound * mx.std(expected)


@pytest.mark.parametrize("name", NAMES)
def test_after_each_token(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    cache = make_prompt_cache(model)
    assert_answers(cache, 0)
    for position in range(1, 18):
        logits_of(model, cache, TEXT[position - 1 : position])
        if name in KINDS or position in BORDERS:
            assert_answers(cache, position)
        if name in KINDS or position == 8:
            assert_saved(model, cache, TEXT[position], tmp_path / "cache.safetensors")


@pytest.mark.parametrize("bits", [{}, {"kv_bits": 8}, {"kv_bits": 8, "quantize_after": 9}], ids=str)
@pytest.mark.parametrize("way", ["grown", "rewound", "removed", "trimmed", "restored", "of a batch"])
def test_a_chunk_of_which_nothing_is_held(way: str, bits: dict[str, Any], tmp_path: Path) -> None:
    """However a conversation comes to a chunk's first token; in float and packed, alone and in batches."""
    model, file = model_of("llama4", is_wide=True), tmp_path / "cache.safetensors"
    is_short = way in ("grown", "restored")
    cache = make_prompt_cache(model, rewind=0 if is_short else 11, kv_group_size=32, **bits)
    logits_of(model, cache, TEXT[: 8 if is_short else 11])
    position = 8
    if way == "rewound":
        cache.rewind_to(8)
    elif way == "removed":
        cache.remove(2, 5)
    elif way == "trimmed":
        assert [layer.trim(99) for layer in cache] == [11] * len(cache)
        position = 0
    elif way == "restored":
        cache.save(file)
        cache.close()
        cache = PromptCache.load(file, model)
    elif way == "of a batch":
        cache.rewind_to(8)
        batch = [layer.merge([layer, layer]) for layer in cache]
        mx.eval([layer.state for layer in batch])
        cache = PromptCache(batch[0].extract(1).rows)
    mx.eval([layer.state for layer in cache])
    mx.eval([layer.state for layer in [layer.merge([layer]) for layer in cache]])
    assert [layer.offset for layer in cache] == [position] * len(cache)
    held = [0 if hasattr(layer, "chunk_size") else position for layer in cache]
    plain = [layer.plain_state for layer in cache]
    assert [0 if keys is None else keys.shape[2] for keys, *_ in plain] == held
    if position:
        assert_saved(model, cache, TEXT[20], file, 0.05 if bits else EXACT)


def generated(model: nn.Module, cache: Any, prompt: list[int], block: int) -> tuple[list[int], mx.array]:
    steps = generate_step(mx.array(prompt), model, max_tokens=4, prompt_cache=cache, prefill_step_size=block)
    tokens, logprobs = zip(*steps, strict=True)
    return list(tokens), mx.stack(list(logprobs))


@lru_cache(maxsize=1)
def theirs(name: str) -> tuple[list[int], mx.array]:
    """By mlx-lm's own caches, token by token, which is exact everywhere."""
    return generated(model_of(name), make_theirs(model_of(name)), TEXT[:25], 1)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in NAMES for block in (range(1, 13) if name in KINDS else (8,))],
)
def test_mlx_lms_loop(name: str, block: int) -> None:
    model, (tokens, logprobs) = model_of(name), theirs(name)
    found, ours = generated(model, make_prompt_cache(model), TEXT[:25], block)
    assert found == tokens
    assert difference(ours, logprobs) <= EXACT * mx.std(logprobs)
