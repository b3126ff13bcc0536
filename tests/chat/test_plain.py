"""The line mode, with the real model: its commands, and what it reuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import pytest

from examples.chat.engine import Engine
from examples.chat.events import Event, Said
from examples.chat.plain import Plain
from examples.chat.settings import Settings

from .fresh import difference_to_fresh

SYSTEM = "You are a helpful AI assistant."


@pytest.fixture
def plain(chat_model: tuple[nn.Module, Any]) -> Callable[..., Plain]:
    def make(**options: Any) -> Plain:
        model, tokenizer = chat_model
        settings = Settings(**({"capacity": None, "temperature": 0.0, "max_tokens": 10} | options))
        return Plain(Engine(model, tokenizer, settings), SYSTEM)

    return make


def costs(plain: Plain) -> list[Any]:
    return [message.cost for message in plain.conversation.path if message.cost]


def assert_cached_as_said(plain: Plain) -> None:
    assert difference_to_fresh(plain.engine, plain.conversation)[1] <= 2e-4


def test_only_what_is_new_is_read(plain: Callable[..., Plain], capsys: pytest.CaptureFixture[str]) -> None:
    chat = plain()
    chat.handle("What is the capital of France?")
    chat.handle("What is the capital of Italy?")
    first, second = costs(chat)
    assert (first.reused, first.prefilled) == (0, 28)
    assert second.reused == 28 + first.generated - (chat.conversation.path[1].ended != "")
    assert second.prefilled <= 18
    chat.handle("/edit What is the capital of Japan?")
    assert costs(chat)[-1].prefilled <= 18
    chat.handle("/regenerate")
    assert costs(chat)[-1].prefilled == 1
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "Rome" in printed
    assert "Tokyo" in printed
    assert_cached_as_said(chat)


def test_the_oldest_turns_make_room(plain: Callable[..., Plain], capsys: pytest.CaptureFixture[str]) -> None:
    chat = plain(capacity=80)
    for question in ("Name a fruit.", "Name a color.", "Name a city.", "Name a river."):
        chat.handle(question)
    assert sum(cost.forgotten for cost in costs(chat)) > 0
    # Every prompt's tokens were read once, although turns have been taken out.
    assert sum(cost.prefilled for cost in costs(chat)) < 28 + 4 * 14
    before = chat.conversation.path
    assert "of 80 tokens, nearly full: the oldest messages are forgotten soon]" in capsys.readouterr().out
    chat.handle("word " * 100)
    assert "the capacity is 80" in capsys.readouterr().out
    assert chat.conversation.path == before


def test_ctrl_c_ends_an_answer_and_keeps_it(
    plain: Callable[..., Plain], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = plain(max_tokens=200)
    printed = chat._print

    def interrupting(event: Event) -> None:
        printed(event)
        if len(heard) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        if isinstance(event, Said):
            heard.append(event)

    heard: list[Event] = []
    monkeypatch.setattr(chat, "_print", interrupting)
    chat.handle("Count from one to a hundred.")
    assert "[stopped]" in capsys.readouterr().out
    assert chat.conversation.path[-1].ended == "stopped"
    begun = chat.conversation.path[-1].text
    chat.engine.settings = replace(chat.engine.settings, max_tokens=4)
    chat.handle("/continue")
    reply: Any = chat.conversation.path[-1]
    assert reply.text.startswith(begun)
    assert (reply.cost.prefilled, reply.cost.generated) == (1, 4)
    assert_cached_as_said(chat)


def test_commands(plain: Callable[..., Plain], capsys: pytest.CaptureFixture[str]) -> None:
    chat = plain(max_tokens=6)
    script = ["", "Say hi.", "/fork", "/edit 1 Say bye.", "/switch 1", "/undo", "/undo", "/edit", "/edit 5 x"]
    chat.handle("/continue")
    for line in [*script, "/switch 3", "/stats", "/attach missing.txt x", "/help", "/what"]:
        assert chat.handle(line)
    assert not chat.handle("/quit")
    printed = capsys.readouterr().out
    for said in (
        "reused 0 of 24 tokens",
        "Version 2 of 2; what was said is shared, not copied.",
        "Taken back: Say hi.",
        "[there is no message 0; there are 0]",
        "/edit needs the new text.",
        "[there is no message 5; there are 0]",
        "[there is no version 3; there are 1 to 2]",
        "2 versions",
        "tokens in this version, no limit",
        "so far reused",
        "[the last reply is complete; only",
        "[cannot read missing.txt: No such file",
        "/regenerate",
        "There is no /what",
    ):
        assert said in printed, (said, printed)
