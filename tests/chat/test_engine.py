"""Replies: what is reused, what is forgotten, and that what is cached is what was said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from examples.chat.engine import Engine
from examples.chat.events import Progress, Reading, Said, Seen, Stored
from examples.chat.prompt import TooLong
from examples.chat.reading import Piece, compose
from examples.chat.settings import Settings
from examples.chat.tree import Conversation, Message, new_id
from tests.plugin.running import greedy
from tests.plugin.tiny import tiny_gpt2

from .fresh import difference_to_fresh, tokens_of
from .test_reading import with_template

SETTINGS = Settings(capacity=None, temperature=0.0, max_tokens=8, memory=64)


class Talk:
    """A conversation with an engine, and what was told meanwhile."""

    def __init__(
        self,
        model: tuple[nn.Module, Any],
        folder: Path | None = None,
        settings: Settings = SETTINGS,
        **options: Any,
    ) -> None:
        self.engine = Engine(model[0], model[1], replace(settings, **options), folder)
        self.conversation = Conversation(system="Be brief.")
        self.events: list[Any] = []

    def say(self, text: str, parent: str | None = "leaf") -> Any:
        asked = self.conversation.say(text, self.conversation.leaf if parent == "leaf" else parent)
        return self.answer(asked)

    def answer(self, asked: Message, is_stopped: Callable[[], bool] = lambda: False) -> Any:
        name = new_id()
        replied = self.engine.reply(self.conversation, asked, name, self.events.append, is_stopped)
        replied_to = asked if asked.role == "user" else self.conversation.messages[str(asked.parent)]
        self.conversation.take(replied_to, name, replied)
        return self.conversation.path[-1]

    @property
    def asked(self) -> Any:
        """The last message of the user."""
        return self.conversation.path[-2]

    def check(self) -> int:
        cached, difference = difference_to_fresh(self.engine, self.conversation)
        assert difference <= 2e-4
        return cached


def test_only_what_is_new_is_read(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    first = talk.say("Hello there").cost
    assert (first.reused, first.generated) == (0, 8)
    second = talk.say("And again").cost
    assert second.reused == first.prefilled + 8
    assert second.saved > 0
    talk.check()
    said = "".join(event.text for event in talk.events if isinstance(event, Said))
    assert said == "".join(m.text for m in talk.conversation.path if m.role == "assistant")


def test_an_edit_of_the_last_of_20_messages_reads_the_change_only(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    for turn in range(10):
        talk.say(f"Question number {turn}")
    assert len(talk.conversation.path) == 20
    asked = talk.asked
    tokens = len(asked.piece.tokens)
    cost = talk.say("Question number 7, changed", asked.parent).cost
    assert cost.prefilled <= tokens + 4
    assert cost.reused > 150
    assert talk.check() > 0


def test_going_to_another_branch_reads_nothing(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    talk.say("Hello")
    first = talk.say("one")
    talk.say("two", talk.conversation.messages[first.parent].parent)
    read = talk.engine.watch.totals.prefilled
    talk.conversation.look_at(first.id)
    talk.engine.warm(talk.conversation, talk.events.append)
    assert talk.engine.watch.totals.prefilled == read
    seen = talk.events[-1]
    assert isinstance(seen, Seen)
    assert seen.cached == len(tokens_of(talk.engine, talk.conversation))
    cost = talk.say("three").cost
    assert cost.prefilled <= len(talk.asked.piece.tokens) + 1
    talk.check()


def test_a_reply_made_again_reads_one_token(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    talk.say("Hello")
    again = talk.answer(talk.conversation.path[-2])
    assert again.cost.prefilled == 1
    assert again.text == talk.conversation.beside(again)[0].text


def test_after_a_restart_nothing_is_read_again(tiny_model: tuple[nn.Module, Any], tmp_path: Path) -> None:
    talk = Talk(tiny_model, tmp_path)
    talk.say("Hello there")
    talk.say("How are you?")
    talk.engine.close()
    later = Talk(tiny_model, tmp_path)
    later.conversation = talk.conversation
    # Before it is opened, it is known to be on disk.
    later.engine.survey([later.conversation, Conversation()], later.events.append)
    held = len(tokens_of(later.engine, later.conversation))
    assert later.events == [Stored({later.conversation.id: held})]
    later.engine.warm(later.conversation, later.events.append)
    assert later.events[-1].cached == later.check()
    cost = later.say("Go on").cost
    assert cost.prefilled <= len(later.asked.piece.tokens) + 1
    later.check()


@pytest.mark.parametrize("capacity", [64, 100])
def test_the_oldest_turns_make_room(flat_model: tuple[nn.Module, Any], capacity: int) -> None:
    talk = Talk(flat_model, capacity=capacity)
    forgotten = read = 0
    for turn in range(12):
        cost = talk.say(f"Question number {turn} is this one").cost
        forgotten += cost.forgotten
        read += cost.prefilled
        talk.check()
        assert talk.events[-1].cached <= capacity
    path: list[Any] = talk.conversation.path
    assert forgotten > 0
    assert path[-1].start > 0
    # Nothing was read twice, although turns were taken out.
    assert read <= 10 + sum(len(m.piece.tokens) + 1 for m in path if m.role == "user")
    assert talk.events[-1].moved != (0, 0)


@pytest.mark.parametrize("capacity", [None, 256])
def test_after_dropped_thinking_only_what_is_new_is_read(
    flat_model: tuple[nn.Module, Any], capacity: int | None
) -> None:
    model, tokenizer = flat_model
    # The first words of a reply are its thinking, which later prompts lack.
    thinking = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'assistant' else "
        "m.content.split(' ', 3)[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    talk = Talk((model, thinking), capacity=capacity, max_tokens=48)
    read, forgotten = [], 0
    for turn in range(4):
        cost = talk.say(f"Question {turn}: " + "what do you think of it? " * 5).cost
        read.append(cost.prefilled)
        forgotten += cost.forgotten
    talk.check()
    # A message of 53 tokens, or 54 after forgotten ones, whose end was read with them.
    assert max(read[1:]) <= 54, read
    assert (forgotten > 0) == (capacity is not None)
    read_so_far = talk.engine.watch.totals.prefilled
    talk.engine.warm(talk.conversation, talk.events.append)
    assert talk.engine.watch.totals.prefilled == read_so_far


def test_room_is_made_while_a_reply_is_written(flat_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(flat_model, capacity=80, max_tokens=24)
    talk.say("a b c")
    reply = talk.say("d e f")
    path: list[Any] = talk.conversation.path
    assert reply.start == 2 > path[-2].start
    # What is forgotten is told when it happens.
    told = [event for event in talk.events if isinstance(event, Progress)]
    before = next(event for event in told if event.start)
    assert 0 < before.cost.forgotten == reply.cost.forgotten
    assert before.cost.generated < reply.cost.generated
    talk.check()
    talk.say("g h i")
    talk.check()


def test_a_reply_longer_than_the_capacity_forgets_its_own_beginning(
    flat_model: tuple[nn.Module, Any],
) -> None:
    talk = Talk(flat_model, capacity=80, max_tokens=200)
    reply = talk.say("a b c")
    assert (reply.ended, reply.cost.generated) == ("length", 200)
    assert reply.cost.forgotten >= 200 - 80
    assert talk.events[-1].cached <= 80
    # The next message forgets it all.
    assert talk.say("d e f").start == 2


def test_what_has_forgotten_serves_nobody_else(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model, capacity=100)
    for turn in range(8):
        talk.say(f"Question number {turn} is this one")
    path: list[Any] = talk.conversation.path
    assert path[-1].start
    other = Conversation(system="Be brief.")
    asked = other.say(path[path[-1].start].text, None)
    cost = talk.engine.reply(other, asked, new_id()).cost
    assert cost is not None
    # As much as it has in common with the first question, which had nothing to forget.
    assert (cost.reused, cost.prefilled) == (14, 10)


def test_a_message_that_never_fits(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model, capacity=64)
    talk.say("Hello")
    before = len(talk.engine.pool)
    asked = talk.conversation.say("word " * 5000, talk.conversation.leaf)
    with pytest.raises(TooLong, match=r"5,0\d\d tokens, and the capacity is 64"):
        talk.answer(asked)
    assert len(talk.engine.pool) == before


def test_stopped_between_blocks_of_reading(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    asked = talk.conversation.say("word " * 400, None)
    assert talk.answer(asked, lambda: any(isinstance(e, Reading) and e.done for e in talk.events)) is asked
    read = max(event.done for event in talk.events if isinstance(event, Reading))
    assert 0 < read < 400
    cost = talk.answer(asked).cost
    assert cost.reused == read
    talk.check()


def test_stopped_while_writing(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    asked = talk.conversation.say("Hello", None)
    tokens = iter([False, False, False, False, True])
    reply = talk.answer(asked, lambda: next(tokens))
    assert reply.ended == "stopped"
    assert reply.cost.generated == 2
    assert "".join(event.text for event in talk.events if isinstance(event, Said)) == reply.text
    # It is continued where it stopped, as if it had not stopped.
    rest = talk.answer(reply)
    assert (rest.cost.prefilled, rest.cost.generated) == (1, 8)
    assert rest.text.startswith(reply.text)
    assert talk.conversation.beside(reply) == [reply, rest]
    whole = Talk(tiny_model, max_tokens=10).say("Hello")
    assert rest.piece.tokens == whole.piece.tokens
    talk.say("Go on")
    talk.check()


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits(tiny_model: tuple[nn.Module, Any], bits: int) -> None:
    talk = Talk(tiny_model, bits=bits)
    whole = Talk(tiny_model)
    for talking in (talk, whole):
        talking.say("Hello there, this is a text of some length to have something to store")
        talking.say("How are you?")
    assert talk.events[-1].nbytes < whole.events[-1].nbytes
    assert difference_to_fresh(talk.engine, talk.conversation)[1] < 0.5


def test_a_window(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model, window=16, sinks=2)
    for turn in range(12):
        talk.say(f"Question number {turn} is this one")
    seen = talk.events[-1]
    [holding] = seen.holdings
    assert holding.rule.size == 16
    assert holding.rule.sinks == 2
    held = sum(span.length for span in holding.runs[seen.current])
    assert held < seen.cached
    Talk(tiny_model)
    assert "make_cache" not in vars(tiny_model[0])


def test_a_seed_repeats_a_reply_and_a_penalty_ends_repetition(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model, temperature=1.5, seed=3, min_p=0.001)
    first = talk.say("Hello")
    assert talk.answer(talk.asked).text == first.text
    talk.engine.settings = replace(talk.engine.settings, seed=4)
    assert talk.answer(talk.asked).text != first.text
    plain, penalized = (
        Talk(tiny_model, max_tokens=32, repetition_penalty=p).say("Hello there") for p in (1.0, 2.0)
    )
    assert len(set(plain.piece.tokens)) < len(set(penalized.piece.tokens))


def test_a_folder_that_cannot_be_used(tiny_model: tuple[nn.Module, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    talk = Talk(tiny_model, tmp_path / "file" / "caches")
    assert "not kept" in talk.engine.notice
    talk.say("Hello")
    talk.engine.close()


def test_another_tokenizer_reads_all_anew(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    talk.say("Hello")
    talk.conversation.reader = "another"
    path: list[Any] = talk.conversation.path
    for message in path:
        message.piece = Piece(message.piece.text, tuple(7 for _ in message.piece.tokens))
    talk.say("Again")
    assert all(7 not in message.piece.tokens[1:] for message in talk.conversation.path if message.piece)
    talk.check()


def test_another_system_prompt(tiny_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(tiny_model)
    talk.say("Hello")
    talk.conversation.system = "Be kind."
    cost = talk.say("Again").cost
    assert cost.prefilled > cost.reused
    talk.check()


@pytest.fixture(scope="session")
def learned_model(tokenizer: Any) -> tuple[nn.Module, Any]:
    """Positions are added to the embeddings, so keys cannot be moved to other positions."""
    return tiny_gpt2(n_positions=512, n_embd=32, vocab_size=49152), tokenizer


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_full_chat_goes_on_where_keys_cannot_move(
    learned_model: tuple[nn.Module, Any], earlier: int
) -> None:
    talk = Talk(learned_model, capacity=96, max_tokens=200)
    for _ in range(earlier):
        talk.engine.settings = replace(talk.engine.settings, max_tokens=8)
        talk.say("an earlier question")
        talk.engine.settings = replace(talk.engine.settings, max_tokens=200)
    reply = talk.say("a b c")
    assert reply.ended == "capacity"
    for _ in range(3):
        rest = talk.answer(reply)
        # It forgets what is oldest, and reads the rest again.
        assert rest.text.startswith(reply.text)
        assert rest.ended == "capacity"
        assert rest.cost.forgotten > 0
        assert talk.events[-1].cached <= 96
        context = compose(talk.engine.tokenizer, "Be brief.", [talk.asked.turn]).tokens
        kept = list(reply.piece.tokens)
        kept = kept[len(kept) + len(context) - rest.cost.read :]
        written = list(rest.piece.tokens[len(reply.piece.tokens) :])
        assert greedy(learned_model[0], context + kept, len(written)) == written
        reply = rest
    # The next question makes room as always.
    assert talk.say("d e f").start > 0


def test_a_reply_that_forgot_its_own_beginning_goes_on(flat_model: tuple[nn.Module, Any]) -> None:
    talk = Talk(flat_model, capacity=80, max_tokens=100)
    reply = talk.say("a b c")
    assert reply.ended == "length"
    rest = talk.answer(reply)
    assert (rest.ended, rest.cost.generated) == ("length", 100)
    assert rest.text.startswith(reply.text)
    assert talk.events[-1].cached <= 80


def test_after_a_reply_that_forgot_and_went_on_only_what_is_new_is_read(
    flat_model: tuple[nn.Module, Any],
) -> None:
    talk = Talk(flat_model, capacity=96, max_tokens=12)
    while not (cost := talk.say("a b c").cost).forgotten:
        pass
    reply = talk.conversation.path[-1]
    assert reply.ended == "length"
    while not (rest := talk.answer(reply)).cost.forgotten:
        reply = rest
    talk.check()
    cost = talk.say("d e f").cost
    assert cost.prefilled <= len(talk.asked.piece.tokens) + 1
    talk.check()
