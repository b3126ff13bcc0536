"""Measures what a splice costs: loss and agreement on text after a prompt that changed before its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from benchmarks.rows import Row, less
from benchmarks.setting import Setting
from benchmarks.text import divergences, log_probabilities, losses_of, topics
from mlx_kvcache.plugin import PromptCache, make_prompt_cache

AFTER, BLOCK = 256, 512
RECOMPUTE = (0.0, 0.05, 0.15)


@dataclass(frozen=True)
class Change:
    """A prompt before and after a change, and the text that follows."""

    before: list[int]
    after: list[int]
    follows: list[int]


def run(setting: Setting) -> Iterator[Row]:
    """Loss and top-1 agreement of 256 tokens after a splice, against a fresh prefill and losing the text."""
    model, tokenizer = setting.load("smollm2")
    for key, (name, change) in _changes(tokenizer, setting.is_quick).items():
        whole = change.after + change.follows
        fresh = _foretold(model, make_prompt_cache(model), whole)
        read = make_prompt_cache(model)
        _foretold(model, read, change.before)
        for recompute in tqdm(RECOMPUTE, desc=name, unit="way", leave=False):
            cache = read.fork()
            rest = cache.splice(change.before, whole, recompute=recompute).rest
            logs = _foretold(model, cache, rest)
            yield from _rows(f"{key}.{recompute:g}", f"{name}, recompute={recompute:g}", logs, fresh, change)
            if not recompute:
                lost = _foretold(model, make_prompt_cache(model), _without_runs(read, change))
                yield from _rows(
                    f"{key}.lost", f"{name}, the text after the change lost", lost, fresh, change
                )


def _rows(key: str, work: str, logs: mx.array, fresh: mx.array, change: Change) -> Iterator[Row]:
    loss, expected = (float(losses_of(part, change.follows).mean()) for part in (logs, fresh))
    yield less(f"splice.loss.{key}", work, "nats", loss, "computed afresh", expected)
    agrees = float(np.array(mx.argmax(logs, axis=-1) == mx.argmax(fresh, axis=-1)).mean())
    yield Row(f"splice.agreement.{key}", f"{work}: equal likeliest tokens", "", agrees)
    divergence = float(divergences(fresh, logs).mean())
    yield Row(f"splice.divergence.{key}", f"{work}: KL divergence", "nats", divergence)


def _foretold(model: Any, cache: PromptCache, tokens: list[int]) -> mx.array:
    """Read tokens, and return the log probabilities (255, vocabulary) that predict the last 255."""
    begin = max(0, len(tokens) - AFTER)
    for start in [*range(0, begin, BLOCK), begin]:
        stop = min(start + BLOCK, begin) if start < begin else len(tokens)
        logits: mx.array = model(mx.array([tokens[start:stop]]), cache=cache)[0]
        mx.eval(logits[-1])
    return log_probabilities(logits[:-1])


def _without_runs(read: PromptCache, change: Change) -> list[int]:
    """The tokens that remain if only the common prefix of a changed prompt is kept, and what is new."""
    cache = read.fork()
    splice = cache.splice(change.before, change.after + change.follows)
    prefix = sum(run.length for run in splice.runs if run.is_prefix)
    return change.after[:prefix] + splice.rest


def _changes(tokenizer: Any, is_quick: bool) -> dict[str, tuple[str, Change]]:
    """The changes to measure, by name: of plain text, and of conversations."""
    text = topics(tokenizer, 12_000)

    def words(begin: int, n: int) -> str:
        part: str = tokenizer.decode(text[begin : begin + n])
        return part

    found: dict[str, tuple[str, Change]] = {
        "gap": (
            "384 tokens of text removed, 384 after them kept",
            Change(text[:1152], text[:384] + text[768:1152], text[1152 : 1152 + AFTER]),
        )
    }
    if is_quick:
        return found
    for length in (10, 100, 500, 2000):
        found[f"think.{length}"] = (
            f"thinking of {length:,} tokens removed from each of 2 replies",
            _conversation(tokenizer, words, length, lambda turns: [(q, "", a) for q, _, a in turns]),
        )
    found["tool"] = (
        "a tool's result of 1,000 tokens shortened to 100",
        Change(
            text[:500] + text[3000:4000] + text[500:1000],
            text[:500] + text[3000:3100] + text[500:1000],
            text[1000 : 1000 + AFTER],
        ),
    )
    found["oldest"] = (
        "the 2 oldest of 6 turns removed",
        _conversation(tokenizer, words, 0, lambda turns: turns[2:], count=6),
    )
    found["header"] = (
        "8 tokens replaced at the head of 4,000",
        Change(text[:4000], text[:20] + text[9000:9008] + text[28:4000], text[4000 : 4000 + AFTER]),
    )
    return found


Turn = tuple[str, str, str]
"""A question, what is thought about it, and the answer."""


def _conversation(
    tokenizer: Any,
    words: Callable[[int, int], str],
    thinking: int,
    edit: Callable[[list[Turn]], list[Turn]],
    count: int = 2,
) -> Change:
    """A conversation before and after an edit of its turns, and an answer that goes on."""
    turns = [
        (words(700 * i, 60), words(5000 + 2000 * i, thinking), words(700 * i + 60, 300)) for i in range(count)
    ]
    last = 700 * count

    def rendered(turns: list[Turn]) -> list[int]:
        messages = [{"role": "system", "content": "You explain Python, in the words of its documentation."}]
        for question, thought, answer in turns:
            told = f"<think>{thought}</think>\n{answer}" if thought else answer
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": told}]
        messages.append({"role": "user", "content": f"Go on: {words(last, 60)}"})
        tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return tokens

    return Change(rendered(turns), rendered(edit(turns)), tokenizer.encode(words(last + 60, AFTER))[:AFTER])
