"""The chat, with the real model: what it reuses, and that what it cached is what was said."""

from __future__ import annotations

import pytest

from examples.chat.conversation import Conversation, TooLong
from examples.chat.terminal import Terminal
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of

SYSTEM = "You are a helpful AI assistant."


@pytest.fixture
def conversation(chat_model):
    model, tokenizer = chat_model
    return Conversation(model, tokenizer, SYSTEM, max_tokens=10)


def say(conversation: Conversation, message: str, **options: int) -> str:
    return "".join(conversation.ask(message, **options))


def assert_cached_as_said(conversation: Conversation) -> None:
    """The cache continues as a fresh one that has read the same tokens."""
    cached = conversation.tokens[: conversation.cache.position]
    assert conversation.text.startswith(conversation.tokenizer.decode(cached))
    probe = conversation.tokens[:2]
    ours = logits_of(conversation.model, conversation.cache.fork(), probe)
    fresh = logits_of(conversation.model, make_prompt_cache(conversation.model), cached + probe)
    assert difference(ours, fresh[-2:]) <= 2e-4


def test_only_what_is_new_is_read(conversation):
    assert "Paris" in say(conversation, "What is the capital of France?")
    first = conversation.answer
    assert (first.reused, first.prefilled) == (0, 28)
    assert "Rome" in say(conversation, "What is the capital of Italy?")
    second = conversation.answer
    assert second.reused == 28 + first.generated
    assert second.prefilled == 17
    say(conversation, "What is the capital of Japan?", instead_of=2)
    edited = conversation.answer
    assert (edited.reused, edited.prefilled) == (28 + first.generated, 17)
    "".join(conversation.regenerate())
    assert conversation.answer.prefilled == 1
    assert conversation.turns == 2
    assert_cached_as_said(conversation)


def test_a_fork_costs_nothing_and_goes_its_own_way(conversation):
    say(conversation, "What is the capital of France?")
    before = conversation.cache.pool.nbytes
    branch = conversation.fork()
    assert branch.cache.pool.nbytes == before
    say(branch, "Name one color.")
    assert branch.answer.reused == conversation.cache.position
    assert conversation.turns == 1
    assert branch.turns == 2
    assert_cached_as_said(conversation)
    assert_cached_as_said(branch)


def test_the_oldest_turns_make_room(chat_model):
    model, tokenizer = chat_model
    conversation = Conversation(model, tokenizer, SYSTEM, capacity=80, max_tokens=10)
    forgotten = read = 0
    for question in ("Name a fruit.", "Name a color.", "Name a city.", "Name a river."):
        say(conversation, question)
        forgotten += conversation.answer.forgotten
        read += conversation.answer.prefilled
        assert conversation.cache.position <= 80
    assert forgotten > 0
    assert conversation.messages[0]["content"] == SYSTEM
    assert conversation.messages[1]["content"] != "Name a fruit."
    # Every prompt's tokens were read once, although turns have been taken out.
    assert read < 28 + 4 * 14
    before = [dict(message) for message in conversation.messages]
    with pytest.raises(TooLong, match="capacity is 80"):
        say(conversation, "word " * 100)
    assert conversation.messages == before


def test_stopping_early_keeps_what_was_said(conversation):
    answer = conversation.ask("Count from one to ten.")
    heard = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    say(conversation, "Go on.")
    assert_cached_as_said(conversation)


def test_commands(chat_model, capsys):
    model, tokenizer = chat_model
    terminal = Terminal(model, tokenizer, SYSTEM, None, 6, 0.0)
    script = ["", "Say hi.", "/fork", "/edit 1 Say bye.", "/switch 1", "/undo", "/undo", "/edit", "/edit 5 x"]
    for line in [*script, "/switch 3", "/stats", "/help", "/what"]:
        assert terminal.handle(line)
    assert not terminal.handle("/quit")
    printed = capsys.readouterr().out
    for said in (
        "0 tokens reused, 25 prefilled",
        "Branch 2 of 2; it took 0 bytes.",
        "Taken back: Say hi.",
        "[there is no message 0; there are 0]",
        "/edit needs the new text.",
        "[there is no message 5; there are 0]",
        "[there is no branch 3; there are 1 to 2]",
        "2 branches",
        "/regenerate",
        "There is no /what",
    ):
        assert said in printed, (said, printed)
    assert [branch.turns for branch in terminal.branches] == [0, 1]
