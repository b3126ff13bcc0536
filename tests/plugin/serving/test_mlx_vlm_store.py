"""mlx-vlm's prefix cache (APC) on attached models: what requests share, and what they must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm import apc
from mlx_vlm.server import generation

from mlx_kvcache.plugin import attach, make_session_pool
from tests.plugin.serving.mlx_vlm_models import (
    pictures_of,
    prompt,
    tiny_gemma3,
    tiny_lfm2,
    tiny_qwen2_vl,
)
from tests.plugin.serving.mlx_vlm_running import Generating, Reply, replied, watched

Ask = Callable[..., Reply]
"""Replies to a prompt with pictures."""


@contextmanager
def streaming(model: nn.Module, processor: Any, manager: apc.APCManager | None, **more: Any) -> Iterator[Ask]:
    """Requests by `stream_generate`."""

    def ask(tokens: Sequence[int], *pictures: int, tenant: str | None = None) -> Reply:
        return replied(model, processor, tokens, *pictures, apc_manager=manager, apc_tenant=tenant, **more)

    yield ask


@contextmanager
def batching(model: nn.Module, processor: Any, manager: apc.APCManager | None, **more: Any) -> Iterator[Ask]:
    """Requests by the server's `ResponseGenerator`."""
    prompts: dict[int, dict[str, mx.array]] = {}
    numbers = count()
    resources = model, processor, model.config
    with (
        patch.object(generation, "load_model_resources", lambda *_: resources),
        patch.object(generation, "prepare_inputs", lambda _, **given: dict(prompts[int(given["prompts"])])),
    ):
        server = generation.ResponseGenerator("model", apc_manager=manager, **more)
        server.wait_until_ready()

        def ask(tokens: Sequence[int], *pictures: int, tenant: str | None = None) -> Reply:
            mask = mx.ones((1, len(tokens)), mx.int32)
            media = pictures_of(model, *pictures)
            number = next(numbers)
            prompts[number] = {"input_ids": mx.array([tokens]), "attention_mask": mask, **media}
            mx.eval(prompts[number])
            args = generation.GenerationArguments(max_tokens=8, temperature=0.0, tenant_id=tenant)
            _, answer = server.generate(str(number), args=args)
            parts = list(answer)
            return Reply([part.token for part in parts], parts[-1].cached_tokens)

        try:
            yield ask
        finally:
            server.stop_and_join()


WAYS = [streaming, batching]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("make", "way"),
    [(tiny_gemma3, batching), (tiny_qwen2_vl, streaming), (tiny_lfm2, streaming), (tiny_lfm2, batching)],
    ids=lambda value: value.__name__,
)
def test_turns_and_branches(make: Callable[[], nn.Module], way: Any, vlm: tuple[nn.Module, Any]) -> None:
    model, processor = make(), vlm[1]
    first = prompt(40)
    turns = [first, first + prompt(60)[50:], first[:25] + prompt(90)[60:], first]
    with way(model, processor, None) as ask:
        expected = [ask(tokens).tokens for tokens in turns]
    manager = apc.APCManager(num_blocks=4)
    with attach(model), way(model, processor, manager) as ask:
        replies = [ask(tokens) for tokens in turns]
        counts = manager.stats_snapshot()
        manager.clear()
        assert manager.stats_snapshot()["stored_conversations"] == 0
    assert [reply.tokens for reply in replies] == expected
    assert [reply.cached for reply in replies] == [0, 40, 25, 39]
    assert counts["matched_tokens"] == 40 + 25 + 39
    assert counts["lookups_hit"] == 3
    assert counts["stored_conversations"]
    assert counts["resident_bytes"]
    # Nothing is in mlx-vlm's own store.
    assert not counts["pool_used"]
    assert not manager._exact_cache


@pytest.mark.parametrize("make", [tiny_gemma3, tiny_lfm2], ids=lambda make: make.__name__)
def test_replies_are_stored(make: Callable[[], nn.Module], way: Any, vlm: tuple[nn.Module, Any]) -> None:
    """The next turn reads neither the prompt nor the reply again."""
    model, processor = make(), vlm[1]
    tokens, cached = prompt(20), []
    with attach(model), way(model, processor, apc.APCManager(num_blocks=4)) as ask:
        for turn in range(3):
            reply = ask(tokens)
            cached.append(reply.cached)
            tokens = tokens + reply.tokens[:-1] + prompt(30 + turn)[20:]
    assert cached == [0, 20 + 7, 20 + 7 + 10 + 7]


@pytest.mark.parametrize("make", [tiny_gemma3, tiny_qwen2_vl], ids=lambda make: make.__name__)
def test_pictures_are_told_apart(make: Callable[[], nn.Module], way: Any, vlm: tuple[nn.Module, Any]) -> None:
    """Requests share what comes before the first picture that differs, and nothing after it."""
    model, processor = make(), vlm[1]
    one, two = prompt(12, -1, 20), prompt(12, -1, 20, -1, 9)
    requests: list[tuple[list[int], tuple[int, ...]]] = [
        (one, (1,)),
        (one, (2,)),
        (one + prompt(60)[50:], (2,)),
        (two, (1, 2)),
        (two, (1, 3)),
        (two, (2, 1)),
        (two + prompt(70)[60:], (1, 3)),
    ]
    with way(model, processor, None) as ask:
        expected = [ask(tokens, *pictures).tokens for tokens, pictures in requests]
    assert len({tuple(tokens) for tokens in expected[:2]}) == 2
    manager = apc.APCManager(num_blocks=4)
    with attach(model), way(model, processor, manager) as ask:
        replies = [ask(tokens, *pictures) for tokens, pictures in requests]
        # mlx-vlm itself cannot join Gemma's masks of prompts with pictures.
        if way is batching and make is tiny_qwen2_vl:
            with ThreadPoolExecutor(len(requests)) as clients:
                at_once = list(clients.map(lambda request: ask(request[0], *request[1]), requests))
            assert [reply.tokens for reply in at_once] == expected
    assert [reply.tokens for reply in replies] == expected
    # Only Qwen's embeddings are cut before a picture, and only where they have been computed.
    is_cut = make is tiny_qwen2_vl and way is batching
    before = [0, 13, 37, 37, 38, 37, len(two)]
    after = [0, 0, len(one), 0, 0, 0, len(two)]
    assert [reply.cached for reply in replies] == (before if is_cut else after)


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_gemma3, {"prefill_step_size": 8}), (tiny_qwen2_vl, {}), (tiny_lfm2, {"prefill_step_size": 8})],
    ids=["tiny_gemma3", "tiny_qwen2_vl", "tiny_lfm2"],
)
def test_rows_that_go_on_and_rows_that_begin(
    make: Callable[[], nn.Module], options: dict[str, Any], vlm: tuple[nn.Module, Any]
) -> None:
    """Rows of one batch have stored prefixes of unequal lengths, or none."""
    model, processor = make(), vlm[1]
    stored = [prompt(30), prompt(70)[45:]]
    rows = [stored[0] + prompt(60)[50:], prompt(99)[60:], stored[1][:17] + prompt(80)[70:], prompt(9)[3:]]
    expected: list[list[int]] = []
    for tokens in rows:
        run = Generating(model, processor, max_tokens=6)
        run.insert(tokens)
        expected += run.finish().values()
    manager = apc.APCManager(num_blocks=4)
    with attach(model), watched() as calls:
        for tokens in stored:
            run = Generating(model, processor, max_tokens=2, apc_manager=manager)
            run.insert(tokens, salt=7)
            run.finish()
        batch = Generating(
            model, processor, max_tokens=6, apc_manager=manager, prefill_batch_size=4, **options
        )
        ids = batch.insert(*rows, salt=7)
        replies = batch.finish()
    assert [replies[uid] for uid in ids] == expected
    assert manager.stats.matched_tokens == 30 + 17
    assert calls[-1].rows == 4


def test_tenants_share_nothing(way: Any, vlm: tuple[nn.Module, Any]) -> None:
    model, processor = vlm
    tokens = prompt(30)
    manager = apc.APCManager(num_blocks=4)
    with attach(model), way(model, processor, manager) as ask:
        cached = [ask(tokens, tenant=tenant).cached for tenant in ("a", "b", "a", None)]
    assert cached == [0, 0, 29, 0]


def test_quantized_conversations_are_found_by_quantized_requests(
    way: Any, vlm: tuple[nn.Module, Any]
) -> None:
    model, processor = vlm
    tokens = prompt(30)
    manager = apc.APCManager(num_blocks=4)
    with attach(model):
        with way(model, processor, manager, kv_bits=8, quantized_kv_start=0) as ask:
            assert [ask(tokens).cached for _ in range(2)] == [0, 29]
        with way(model, processor, manager) as ask:
            assert [ask(tokens).cached for _ in range(2)] == [0, 29]


def test_what_moved_in_a_prompt_is_kept(vlm: tuple[nn.Module, Any]) -> None:
    """Also when it moved again, and by requests that splice only; M-RoPE has positions for each token."""
    model, processor, same = tiny_gemma3(), vlm[1], prompt(120)[20:]
    prompts = [[*prompt(n), *same[:60], *range(90, 90 + n), *same[60:], n] for n in (5, 9, 7)]
    manager = apc.APCManager(num_blocks=4)
    with attach(model, cache_reuse=32), batching(model, processor, manager) as ask:
        replies = [ask(tokens) for tokens in prompts]
    with attach(model), batching(model, processor, manager) as ask:
        assert ask(prompts[1]).cached < 32
    language_model, pool = model.language_model, make_session_pool(model)
    for tokens, reply in zip(prompts, replies, strict=True):
        with pool.open(tokens, splice=32) as session:
            assert reply.cached == session.reused and (session.reused > 95 or not pool.counts.hits)
            logits = language_model(mx.array([session.rest]), cache=session.cache).logits
            assert reply.tokens[0] == logits[0, -1].argmax().item()
            language_model(mx.array([reply.tokens[:-1]]), cache=session.cache)
            session.extend(reply.tokens[:-1])
    other = tiny_qwen2_vl()
    with attach(other, cache_reuse=32), batching(other, processor, apc.APCManager(num_blocks=4)) as ask:
        assert [ask(tokens).cached < 32 for tokens in prompts] == [True] * 3


def test_the_budget_evicts(vlm: tuple[nn.Module, Any]) -> None:
    model, processor = vlm
    manager = apc.APCManager(num_blocks=4, overrides={"memory_max_gb": 100_000 / 2**30})
    with attach(model), streaming(model, processor, manager) as ask:
        for i in range(8):
            ask(prompt(60 + i)[i:])
        counts = manager.stats_snapshot()
    assert counts["evictions"]
    assert counts["resident_bytes"] <= 100_000


def test_conversations_outlive_the_manager(vlm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    """They are kept in mlx-vlm's folder, pictures too."""
    model, processor = tiny_gemma3(), vlm[1]
    tokens, cached = prompt(12, -1, 20), []
    with attach(model):
        for _ in range(2):
            manager = apc.APCManager(num_blocks=4, disk=apc.DiskBlockStore(tmp_path))
            with streaming(model, processor, manager) as ask:
                cached.append([ask(tokens, picture).cached for picture in (1, 2, 1)])
            manager.close()
    assert cached == [[0, 0, len(tokens) - 1], [len(tokens) - 1] * 3]


def test_a_self_check_finds_no_fault(vlm: tuple[nn.Module, Any]) -> None:
    with attach(vlm[0]):
        assert apc.self_check_model_apc(vlm[0]).ok


@pytest.mark.parametrize("make", [tiny_gemma3, tiny_lfm2], ids=lambda make: make.__name__)
def test_a_prompt_that_is_cancelled_is_kept_as_far_as_it_was_read(
    make: Callable[[], nn.Module], vlm: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, tokens = make(), vlm[1], prompt(40)
    apply, cancelled = generation.ResponseGenerator._apply_cancellations, list[int]()

    def cancelling(self: Any, batch: Any, active: Any) -> None:
        reading = batch and batch._prompt_batch
        if reading and reading._processed_prompt_columns >= 16 and not cancelled:
            cancelled.extend(reading.uids)
            self._cancel(reading.uids[0])
        apply(self, batch, active)

    with batching(model, processor, None) as ask:
        expected = ask(tokens).tokens
    monkeypatch.setattr(generation.ResponseGenerator, "_apply_cancellations", cancelling)
    manager = apc.APCManager(num_blocks=4)
    with attach(model), batching(model, processor, manager, prefill_step_size=8) as ask:
        with pytest.raises(IndexError):
            ask(tokens)
        assert cancelled
        reply = ask(tokens)
    assert (reply.tokens, reply.cached) == (expected, 16)
