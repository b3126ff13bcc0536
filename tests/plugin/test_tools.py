"""mlx-lm's functions for several sequences and for draft models, unchanged, on attached models."""

from __future__ import annotations

from collections import deque
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step

from mlx_kvcache.plugin import PromptCache, attach, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import greedy, model_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(120)]
SPANS = ((0, 17), (20, 26), (30, 71), (40, 43), (50, 60), (60, 61))
PROMPTS = [TEXT[begin:end] for begin, end in SPANS]


@pytest.mark.parametrize(("prompt_length", "drafts"), [(3, 5), (20, 2)])
@pytest.mark.parametrize("name", ["llama:window", "gemma3_text", "cohere2", "llama4"])
def test_speculative_decoding_across_window_borders(name: str, prompt_length: int, drafts: int) -> None:
    """Windows and chunks of 8, a draft model that is often wrong: the tokens of the model alone."""
    model, draft = model_of(name), build(name, seed=1)
    prompt = TEXT[:prompt_length]
    expected = greedy(model, prompt, 30)
    with attach(model), attach(draft):
        found = speculative_generate_step(
            mx.array(prompt), model, draft, num_draft_tokens=drafts, max_tokens=30, prefill_step_size=7
        )
        assert [int(token) for token, _, _ in found] == expected


def test_speculative_decoding_on_a_recurrence() -> None:
    """mlx-lm refuses it on its own caches."""
    model, draft = model_of("mamba2"), build("mamba2", seed=1)
    expected = greedy(model, TEXT[:5], 12)
    with pytest.raises(ValueError, match="trimmable"):
        list(speculative_generate_step(mx.array(TEXT[:5]), model, draft, max_tokens=12))
    with attach(model), attach(draft):
        steps = speculative_generate_step(mx.array(TEXT[:5]), model, draft, max_tokens=12)
        assert [int(token) for token, _, _ in steps] == expected


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next", "mamba", "gemma2", "llama4"]
)
def test_sequences_join_and_leave_a_batch(name: str) -> None:
    """Each gets the tokens that it gets alone, whoever comes and goes."""
    model = model_of(name)
    lengths = [12, 5, 20, 9, 14, 7]
    expected = [greedy(model, prompt, n) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    with attach(model):
        generator = BatchGenerator(model, prefill_step_size=6, prefill_batch_size=2, completion_batch_size=4)
        waiting = deque(range(len(PROMPTS)))
        prompt_of: dict[int, int] = {}
        found: dict[int, list[int]] = {row: [] for row in waiting}
        caches = {}
        step = 0
        while waiting or any(len(found[row]) < lengths[row] for row in prompt_of.values()):
            if waiting and step % 3 == 0:
                row = waiting.popleft()
                [uid] = generator.insert([PROMPTS[row]], [lengths[row]])
                prompt_of[uid] = row
            for response in generator.next()[1]:
                found[prompt_of[response.uid]].append(response.token)
                if response.prompt_cache is not None:
                    caches[prompt_of[response.uid]] = response.prompt_cache, response.all_tokens
            step += 1
        generator.close()
    assert [found[row] for row in range(len(PROMPTS))] == expected
    # What a finished sequence leaves goes on by itself.
    cache, tokens = caches[2]
    more = [token for token, _ in generate_step(mx.array([7]), model, prompt_cache=cache, max_tokens=6)]
    assert more == greedy(model, [*tokens, 7], 6)


def test_removing_a_sequence_from_a_batch_returns_its_cache() -> None:
    model = model_of("gemma3_text")
    with attach(model):
        generator = BatchGenerator(model, prefill_step_size=8)
        uids = generator.insert(PROMPTS[:3], [30] * 3)
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        while len(tokens[uids[1]]) < 5:
            for response in generator.next()[1]:
                tokens[response.uid].append(response.token)
        removed = generator.remove([uids[1]], return_prompt_caches=True)
        while len(tokens[uids[0]]) < 20:
            for response in generator.next()[1]:
                tokens[response.uid].append(response.token)
        generator.close()
    assert tokens[uids[0]] == greedy(model, PROMPTS[0], len(tokens[uids[0]]))
    cache, seen = removed[uids[1]]
    more = [token for token, _ in generate_step(mx.array([7]), model, prompt_cache=cache, max_tokens=6)]
    assert more == greedy(model, [*seen, 7], 6)


def test_a_batch_with_caches_that_are_given_leaves_them_alone() -> None:
    model = tiny_llama()
    with attach(model):
        caches = [make_prompt_cache(model) for _ in range(2)]
        for cache, prompt in zip(caches, PROMPTS, strict=False):
            model(mx.array([prompt]), cache=cache)
        generator = BatchGenerator(model)
        generator.insert([[3, 4], [5]], [4, 4], caches=list(caches))
        found: dict[int, list[int]] = {0: [], 1: []}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        generator.close()
    for row, tail in ((0, [3, 4]), (1, [5])):
        assert found[row] == greedy(model, PROMPTS[row] + tail, 4)
    assert [cache.position for cache in caches] == [17, 6]


def test_caches_of_other_pools_and_models_do_not_join() -> None:
    one, other = tiny_llama(), tiny_llama()
    cache, stranger = make_prompt_cache(one), make_prompt_cache(other)
    with pytest.raises(ValueError, match="different pools"):
        cache[0].merge([cache[0], stranger[0]])
    with pytest.raises(ValueError, match="made for another model"):
        other(mx.array([[1]]), cache=cache)
    assert cache.position == 0


def test_a_model_with_a_draft_beside_it_in_one_list() -> None:
    """As mlx-lm's server keeps them: `cache += draft_cache`, copied and trimmed as one."""
    model, draft = tiny_llama(), tiny_llama(num_hidden_layers=1)
    with attach(model), attach(draft):
        both: list[Any] = make_prompt_cache(model)
        both += make_prompt_cache(draft)
        assert not isinstance(both, PromptCache)
        found = speculative_generate_step(mx.array(TEXT[:9]), model, draft, prompt_cache=both, max_tokens=12)
        assert [int(token) for token, _, _ in found] == greedy(model, TEXT[:9], 12)


def test_a_bound_on_a_hybrid() -> None:
    """A model with recurrent layers goes on beyond `max_kv_size`."""
    model = model_of("qwen3_next")
    with attach(model):
        steps = list(generate_step(mx.array(TEXT[:5]), model, max_kv_size=32, max_tokens=80))
    assert len(steps) == 80


def test_batch_generate_on_the_chat_model(chat_model: tuple[nn.Module, Any]) -> None:
    """Three prompts of unequal length: the texts of three single generations."""
    model, tokenizer = chat_model
    subjects = ("Italy", "the country of Japan", "Spain in Europe")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is the capital of {subject}?"}], add_generation_prompt=True
        )
        for subject in subjects
    ]
    assert len(set(map(len, prompts))) > 2
    alone = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=8) for prompt in prompts]
    with attach(model):
        together = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=8)
    assert together.texts == alone


@pytest.mark.parametrize("name", ["gemma2", "llama4", "gpt_bigcode", "afm7", "minimax_m3_vl"])
def test_a_batch_of_which_one_row_is_left(name: str) -> None:
    """Models whose rows go through in calls of their own: the last row too."""
    model = model_of(name)
    with attach(model):
        generator = BatchGenerator(model)
        generator.insert(PROMPTS[:2], [12, 3])
        found: dict[int, list[int]] = {0: [], 1: []}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        generator.close()
    assert found == {0: greedy(model, PROMPTS[0], 12), 1: greedy(model, PROMPTS[1], 3)}


def test_a_block_that_is_all_padding() -> None:
    """The longest row leaves in the middle of a padded prompt; the rest of the block has no token."""
    model = model_of("mamba2")
    caches = [make_prompt_cache(model) for _ in range(2)]
    batch = [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]
    for layer in batch:
        layer.prepare(lengths=[6, 3], right_padding=[0, 3])
    model(mx.array([TEXT[:4], [*TEXT[10:13], 0]]), cache=batch)
    for layer in batch:
        layer.filter([1])
    model(mx.array([[0, 0]]), cache=batch)
    for layer in batch:
        layer.finalize()
    own = [layer.extract(0) for layer in batch]
    more = [token for token, _ in generate_step(mx.array(TEXT[13:15]), model, prompt_cache=own, max_tokens=5)]
    assert more == greedy(model, TEXT[10:15], 5)
