"""mlx-vlm's `BatchGenerator` on an attached model: rows of unequal lengths that join and leave."""

from __future__ import annotations

import sys
from typing import Any

import mlx.nn as nn
import pytest
from mlx_vlm.generate.ar import batch_generate

from mlx_kvcache import CacheFullError, NotSupportedError
from mlx_kvcache.plugin import attach
from mlx_kvcache.plugin.serving.mlx_vlm_tools import _PATCHES, FUNCTIONS
from tests.plugin.serving.mlx_vlm_models import (
    prompt,
    tiny_gemma3,
    tiny_lfm2,
    tiny_qwen2_vl,
)
from tests.plugin.serving.mlx_vlm_running import Generating, replied, watched

MODELS = [tiny_gemma3, tiny_lfm2, tiny_qwen2_vl]


@pytest.fixture(scope="module", params=MODELS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    return made


def alone(model: nn.Module, processor: Any, tokens: list[int], n: int) -> list[int]:
    """The greedy reply with mlx-vlm's own caches, without a batch."""
    run = Generating(model, processor, max_tokens=n)
    run.insert(tokens)
    [reply] = run.finish().values()
    return reply


@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 8}, {"kv_bits": 8}], ids=str)
def test_batch_generate(vlm: tuple[nn.Module, Any], options: dict[str, Any]) -> None:
    model, processor = vlm
    prompts = ["Once upon a time", "There were " + " ".join(f"word{i}" for i in range(30)), "Hi"]
    expected = batch_generate(model, processor, prompts=prompts, max_tokens=8, **options).texts
    with attach(model), watched() as calls:
        assert batch_generate(model, processor, prompts=prompts, max_tokens=8, **options).texts == expected
    assert calls[-1][2:] == (True, "kv_bits" in options)
    assert calls[-1].rows == 3


def test_rows_join_and_leave(model: nn.Module, vlm: tuple[nn.Module, Any]) -> None:
    processor = vlm[1]
    prompts = [prompt(n) for n in (9, 30, 5, 17, 12)]
    lengths = [12, 4, 9, 9, 6]
    expected = [alone(model, processor, *pair) for pair in zip(prompts, lengths, strict=True)]
    with attach(model), watched() as calls:
        run = Generating(model, processor, prefill_batch_size=2, completion_batch_size=5)
        ids = run.insert(*prompts[:2], max_tokens=lengths[:2])
        run.step(4)
        ids += run.insert(prompts[2], prompts[3], max_tokens=lengths[2:4])
        run.step(3)
        [removed] = run.insert(prompt(11), max_tokens=50)
        ids += run.insert(prompts[4], max_tokens=lengths[4])
        run.step(2)
        assert run.generator.remove(removed)
        replies = run.finish()
    assert [replies[uid] for uid in ids] == expected
    assert max(call.rows for call in calls) >= 3


@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 8}], ids=str)
def test_rows_with_and_without_pictures(options: dict[str, Any], vlm: tuple[nn.Module, Any]) -> None:
    model, processor = tiny_qwen2_vl(), vlm[1]
    rows = [prompt(12, -1, 20), prompt(7), prompt(3, -1, 4, -1, 6), prompt(25)]
    pictures: list[tuple[int, ...]] = [(1,), (), (2, 3), ()]
    expected = [replied(model, processor, *row[:1], *row[1]) for row in zip(rows, pictures, strict=True)]
    with attach(model), watched() as calls:
        run = Generating(model, processor, max_tokens=8, prefill_batch_size=2, **options)
        ids = run.insert(*rows[:2], pictures=pictures[:2])
        run.step(3)
        ids += run.insert(*rows[2:], pictures=pictures[2:])
        replies = run.finish()
    assert [replies[uid] for uid in ids] == [reply.tokens for reply in expected]
    assert max(call.rows for call in calls) == 4


def test_one_row_and_then_more(vlm: tuple[nn.Module, Any]) -> None:
    """mlx-vlm makes no batch for a single prompt; another row joins it all the same."""
    model, processor = vlm
    prompts = [prompt(9), prompt(20)]
    expected = [alone(model, processor, tokens, 10) for tokens in prompts]
    with attach(model), watched() as calls:
        run = Generating(model, processor, prefill_batch_size=1, max_tokens=10)
        ids = run.insert(prompts[0])
        run.step(4)
        ids += run.insert(prompts[1])
        replies = run.finish()
    assert [replies[uid] for uid in ids] == expected
    assert [call.is_batch for call in calls][:2] == [False, False]
    assert calls[-1].is_batch


def test_a_prompt_that_does_not_fit_changes_nothing(vlm: tuple[nn.Module, Any]) -> None:
    model, processor = vlm
    expected = alone(model, processor, prompt(9), 8)
    with attach(model, capacity=20):
        run = Generating(model, processor, max_tokens=8)
        [uid] = run.insert(prompt(9))
        run.step(2)
        with pytest.raises(CacheFullError, match=r"21 cells needed.*20 tokens and leaves no room"):
            run.insert(prompt(5), prompt(20))
        [longer] = run.insert(prompt(12), max_tokens=100)
        replies = run.finish()
    assert replies[uid] == expected
    assert len(replies[longer]) == 20 - 12
    assert replies.keys() == {uid, longer}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kv_bits": 3.5}, "turboquant"),
        ({"kv_bits": 4, "kv_value_scheme": "turboquant"}, "turboquant"),
        ({"kv_bits": 7}, "cannot quantize to 7 bits"),
        ({"kv_bits": 8, "kv_group_size": 128}, r"head_dim 64 .* is not a multiple of group_size 128"),
    ],
    ids=str,
)
def test_options_that_are_not_supported_are_refused(
    vlm: tuple[nn.Module, Any], options: dict[str, Any], told: str
) -> None:
    model, processor = vlm
    with attach(model):
        run = Generating(model, processor, **options)
        with pytest.raises((NotSupportedError, ValueError), match=told):
            run.insert(prompt(9), prompt(5))
        assert not run.generator.has_work


def test_detached_models_use_mlx_vlms_batches_again(vlm: tuple[nn.Module, Any]) -> None:
    model, processor = vlm
    with attach(model):
        pass
    with watched() as calls:
        run = Generating(model, processor, max_tokens=4)
        run.insert(prompt(9), prompt(5))
        run.step(2)
        [kind] = {type(entry).__module__ for entry in run.generator._generation_batch.prompt_cache}
        run.finish()
    assert kind == "mlx_vlm.models.cache"
    assert not calls


def test_nothing_stays_replaced(vlm: tuple[nn.Module, Any]) -> None:
    def found() -> dict[tuple[str, str], Any]:
        modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mlx_vlm"}
        functions = {
            (name, key): vars(module).get(key) for name, module in modules.items() for key in FUNCTIONS
        }
        methods = {(owner.__name__, key): getattr(owner, key) for owner, key, _ in _PATCHES}
        return functions | methods

    before = found()
    with attach(vlm[0]):
        during = found()
    changed = {key for key, value in before.items() if value is not during[key]}
    assert {key for _, key in changed} == {*FUNCTIONS, *(key for _, key, _ in _PATCHES)}
    assert not {key for key, value in found().items() if before[key] not in (None, value)}
    # What a package looks up in its modules was set there.
    assert not {key for key, value in found().items() if value in [ours for _, ours in FUNCTIONS.values()]}
