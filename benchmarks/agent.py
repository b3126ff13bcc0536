"""Measures an agent's loop over mlx-lm's server: prompts that change before their end at every turn."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.measure import once
from benchmarks.rows import Row, less
from benchmarks.setting import Setting
from benchmarks.text import topics
from examples import smollm2
from mlx_kvcache.alignment import common_runs
from tests.plugin.serving.clients import Client, served

SYSTEM, RESULT, TURNS, REPLY = 2000, 120, 20, 40
"""Tokens of the system prompt and of a tool's result, turns, and tokens of a reply."""
WARM = 5
"""The turn from which on the time to the first token counts."""
REUSE = 64
SAME = 8
"""The shortest run of tokens of the turn before that is not new."""

Messages = list[dict[str, str]]


class Turn(NamedTuple):
    """A request, and what the server did.

    Attributes:
        reply: the text of the reply.
        wait: seconds to the first token.
        computed: the tokens of the prompt that were computed.
    """

    messages: Messages
    reply: str
    wait: float
    computed: int


def run(setting: Setting) -> Iterator[Row]:
    """An agent's 20 turns over mlx-lm's server: tokens computed, time to the first token, equal replies."""
    tokenizer = smollm2.load()[1]
    turns = setting.of(TURNS, 3)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2"
        smollm2.export(model)
        with served(model, is_attached=False) as client:
            stock = _talk(client, tokenizer, turns)
        with served(model, cache_reuse=REUSE) as client:
            ours = [_asked(client, turn.messages) for turn in tqdm(stock, desc="spliced", leave=False)]
    new = _new_tokens(tokenizer, stock)
    yield less(
        "agent.computed",
        f"tokens computed in {turns} turns of an agent, --cache-reuse {REUSE}",
        "",
        sum(turn.computed for turn in ours),
        "new tokens",
        sum(new),
    )
    yield less(
        "agent.computed.stock",
        "the same, mlx-lm's own caches",
        "",
        sum(turn.computed for turn in stock),
        "new tokens",
        sum(new),
    )
    late = slice(min(WARM, turns) - 1, None)
    yield once(
        "agent.wait",
        f"time to the first token from turn {min(WARM, turns)} on, median",
        "ms",
        statistics.median(turn.wait for turn in ours[late]),
        "mlx-lm's own caches",
        statistics.median(turn.wait for turn in stock[late]),
    )
    ratios = [theirs.wait / turn.wait for turn, theirs in zip(ours[late], stock[late], strict=True)]
    yield Row("agent.wait.least", "the least ratio of a turn", "times as fast", min(ratios))
    equal = sum(turn.reply == theirs.reply for turn, theirs in zip(ours, stock, strict=True))
    yield Row(
        "agent.equal", f"replies of {REPLY} tokens equal to those of a fresh prefill", "", equal / turns
    )


def _talk(client: Client, tokenizer: Any, turns: int) -> list[Turn]:
    """Talk to a server: each turn drops the thinking of earlier replies and changes the header."""
    text = topics(tokenizer, SYSTEM + turns * RESULT)
    told, history, found = tokenizer.decode(text[:SYSTEM]), Messages(), list[Turn]()
    for turn in tqdm(range(turns), desc="mlx-lm's own caches", leave=False):
        begin = SYSTEM + turn * RESULT
        result = tokenizer.decode(text[begin : begin + RESULT])
        header = f"Turn {turn + 1}, {(turn * 7) % 60} minutes and {turn * 3} tools used so far."
        system = {"role": "system", "content": f"{header}\n{told}"}
        history.append({"role": "user", "content": f"The tool says: {result}\nWhat is next?"})
        found.append(_asked(client, [system, *history]))
        history.append({"role": "assistant", "content": _without_thinking(found[-1].reply)})
    return found


def _without_thinking(reply: str) -> str:
    """The last quarter of a reply. The rest stands for its thinking, which templates drop."""
    words = reply.split(" ")
    return " ".join(words[len(words) * 3 // 4 :])


def _asked(client: Client, messages: Messages) -> Turn:
    body: dict[str, object] = {
        "messages": messages,
        "max_tokens": REPLY,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, wait, parts, usage = time.perf_counter(), 0.0, list[str](), dict[str, Any]()
    with client.open("/v1/chat/completions", body) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                part = choice["delta"].get("content") or ""
                if part and not wait:
                    wait = time.perf_counter() - start
                parts.append(part)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Turn(messages, "".join(parts), wait, usage["prompt_tokens"] - cached)


def _new_tokens(tokenizer: Any, turns: list[Turn]) -> list[int]:
    """The tokens of each prompt that are not in the turn before, in the same order."""
    found, before = list[int](), list[int]()
    for turn in turns:
        prompt = tokenizer.apply_chat_template(turn.messages, add_generation_prompt=True)
        runs = common_runs(before, prompt, SAME)
        found.append(len(prompt) - sum(run.length for run in runs))
        before = prompt + tokenizer.encode(turn.reply, add_special_tokens=False)
    return found
