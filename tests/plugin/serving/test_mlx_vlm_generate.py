"""mlx-vlm's generation and chat on an attached model: the same tokens as with mlx-vlm's own caches."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_vlm
import pytest
from mlx_vlm.chat import MLXVisionChat
from mlx_vlm.generate import PromptCacheState, stream_generate

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import attach, make_prompt_cache
from tests.plugin.serving.mlx_vlm_models import prompt, tiny_gemma3, tiny_qwen2_vl
from tests.plugin.serving.mlx_vlm_running import replied, watched

TEXT = "Once upon a time there was a " + " ".join(f"word{i}" for i in range(20))


@pytest.fixture(scope="module", params=[tiny_gemma3, tiny_qwen2_vl])
def vision(request: pytest.FixtureRequest) -> nn.Module:
    model: nn.Module = request.param()
    return model


OPTIONS: list[dict[str, Any]] = [
    {},
    {"prefill_step_size": 16},
    {"max_kv_size": 256},
    {"kv_bits": 8, "quantized_kv_start": 0},
    {"kv_bits": 4, "quantized_kv_start": 30, "prefill_step_size": 16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generate(vlm: tuple[nn.Module, Any], options: dict[str, Any]) -> None:
    model, processor = vlm
    expected = mlx_vlm.generate(model, processor, TEXT, max_tokens=8, **options).token_ids
    with attach(model), watched() as calls:
        result = mlx_vlm.generate(model, processor, TEXT, max_tokens=8, **options)
        parts = list(stream_generate(model, processor, TEXT, max_tokens=8, **options))
    assert result.token_ids == parts[-1].token_ids == expected
    assert calls
    assert calls[-1].is_quantized == ("kv_bits" in options)


def test_a_cache_that_is_full_shifts(vlm: tuple[nn.Module, Any]) -> None:
    model, processor = vlm
    state = PromptCacheState()
    with attach(model):
        result = mlx_vlm.generate(
            model, processor, TEXT, max_tokens=8, max_kv_size=32, prompt_cache_state=state
        )
        assert state.cache is not None
        assert result.generation_tokens == 8
        assert result.prompt_tokens > 32 >= state.cache.position
        # It no longer holds the tokens that the next turn begins with.
        again = mlx_vlm.generate(
            model, processor, TEXT + " more", max_tokens=8, max_kv_size=32, prompt_cache_state=state
        )
        assert again.cached_tokens == 0


@pytest.mark.parametrize(
    "options", [{"kv_bits": 3.5}, {"kv_bits": 8, "kv_quant_scheme": "turboquant"}], ids=str
)
def test_turboquant_is_refused_by_name(vlm: tuple[nn.Module, Any], options: dict[str, Any]) -> None:
    model, processor = vlm
    with attach(model), pytest.raises(NotSupportedError, match="turboquant"):
        mlx_vlm.generate(model, processor, TEXT, max_tokens=8, **options)


def test_a_chat_reads_only_what_is_new(vlm_folder: Path) -> None:
    chat = MLXVisionChat(str(vlm_folder), temperature=0.0, max_tokens=8, verbose=False)
    replies, calls_of_turns = [], []
    for attached in (nullcontext, attach):
        chat.handle_command("/clear", "")
        with attached(chat.model):
            for text in (TEXT, "And then?"):
                chat.add_to_history("user", text)
                with watched() as calls:
                    replies.append(chat.generate_response())
                chat.add_to_history("assistant", replies[-1])
                calls_of_turns.append(calls)
    assert replies[2:] == replies[:2]
    first, second = (sum(call.columns for call in calls) for calls in calls_of_turns[2:])
    assert not calls_of_turns[1]
    assert second < first


def test_pictures_are_told_apart(vision: nn.Module, vlm: tuple[nn.Module, Any]) -> None:
    """Another picture with as many placeholders is not taken for the one of the last turn."""
    processor = vlm[1]
    first = prompt(12, -1, 20)
    reply = replied(vision, processor, first, 1).tokens
    second = first + reply[:-1] + prompt(50)[40:]
    expected = [replied(vision, processor, second, picture).tokens for picture in (1, 2)]
    assert expected[0] != expected[1]
    with attach(vision), watched() as calls:
        for picture, answer in zip((1, 2), expected, strict=True):
            state = PromptCacheState()
            assert replied(vision, processor, first, 1, prompt_cache_state=state).tokens == reply
            result = replied(vision, processor, second, picture, prompt_cache_state=state)
            assert result.tokens == answer
            assert result.cached == (len(first) + len(reply) - 1 if picture == 1 else 0)
    assert calls


def test_a_state_that_is_filled_by_hand(vlm: tuple[nn.Module, Any]) -> None:
    """Nothing tells which pictures it holds, so that it is not used."""
    model, processor = vlm
    tokens = prompt(30)
    expected = replied(model, processor, tokens)
    with attach(model):
        state = PromptCacheState()
        state.update(tokens[:20], make_prompt_cache(model))
        assert replied(model, processor, tokens, prompt_cache_state=state) == expected
