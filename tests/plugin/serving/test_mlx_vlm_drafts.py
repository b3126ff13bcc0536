"""Speculative decoding of mlx-vlm on an attached model: the same tokens as without a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.speculative.drafters.qwen3_dflash.config import DFlashConfig
from mlx_vlm.speculative.drafters.qwen3_dflash.dflash import DFlashDraftModel

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import attach
from tests.plugin.configurations.build import randomize
from tests.plugin.serving.mlx_vlm_models import VOCABULARY, prompt, tiny_lfm2
from tests.plugin.serving.mlx_vlm_running import replied, watched

BLOCK = 4


@pytest.fixture(scope="module")
def processor(vlm: tuple[nn.Module, Any]) -> Any:
    return vlm[1]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_lfm2()


class Drafter(DFlashDraftModel):  # type: ignore[misc]
    """Drafts what one of the replies goes on with, with more or fewer right tokens from block to block."""

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        config = DFlashConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=VOCABULARY,
            block_size=BLOCK,
            mask_token_id=7,
            target_layer_ids=[0, 2],
            num_target_layers=3,
        )
        super().__init__(config)
        randomize(self, 0)
        self._replies = replies

    def draft_block(self, last_bonus: Any, hidden: Any, cache: Any, block_size: int, *_: Any) -> mx.array:
        token = int(last_bonus)
        reply = next(reply for reply in self._replies if token in reply)
        place = reply.index(token)
        right = [*reply[place + 1 : place + block_size], *[0] * block_size][: block_size - 1]
        return mx.array([[token if i < place % BLOCK else 1 for i, token in enumerate(right)]])

    draft_block_greedy = draft_block


@pytest.fixture(scope="module")
def expected(model: nn.Module, processor: Any) -> dict[int, list[int]]:
    """The replies to prompts of these lengths, without a drafter."""
    return {n: replied(model, processor, prompt(n), max_tokens=20).tokens for n in (30, 9, 17)}


@pytest.fixture(scope="module")
def drafter(expected: dict[int, list[int]]) -> Drafter:
    return Drafter(list(expected.values()))


def test_rejected_tokens_are_dropped(
    model: nn.Module, processor: Any, drafter: Drafter, expected: dict[int, list[int]]
) -> None:
    with attach(model), watched() as calls:
        reply = replied(model, processor, prompt(30), max_tokens=20, draft_model=drafter, draft_kind="dflash")
    assert reply.tokens == expected[30]
    assert BLOCK in {call.columns for call in calls}
    assert len(calls) < 25


def test_rows_accept_different_numbers(
    model: nn.Module, processor: Any, drafter: Drafter, expected: dict[int, list[int]]
) -> None:
    with attach(model), watched() as calls:
        generator = BatchGenerator(
            model.language_model,
            processor,
            stop_tokens=set(),
            max_tokens=20,
            prefill_batch_size=3,
            draft_model=drafter,
            draft_kind="dflash",
        )
        inputs = [
            {"inputs_embeds": model.language_model.model.embed_tokens(mx.array([prompt(n)]))}
            for n in expected
        ]
        ids = generator.insert([prompt(n) for n in expected], prompt_kwargs=inputs)
        replies: dict[int, list[int]] = {uid: [] for uid in ids}
        while generator.has_work:
            for response in generator.next()[1]:
                if response.token is not None:
                    replies[response.uid].append(response.token)
        generator.close()
    assert list(replies.values()) == list(expected.values())
    assert (3, BLOCK) in {call[:2] for call in calls}


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_other_kinds_are_refused_by_name(
    model: nn.Module, processor: Any, drafter: Drafter, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_kvcache.plugin.serving.mlx_vlm_drafts.original_validate", lambda *_: None)
    with attach(model), pytest.raises(NotSupportedError, match=f"drafters of kind {kind}"):
        replied(model, processor, prompt(9), draft_model=drafter, draft_kind=kind)
