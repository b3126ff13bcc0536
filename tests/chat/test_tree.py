"""Conversations as trees: branches, what is looked at, and what is saved of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from examples.chat.export import as_markdown, file_name
from examples.chat.reading import Piece
from examples.chat.tree import Conversation, Cost, Message, Replied, cleaned, new_id, titled


def talked(turns: int = 3) -> Conversation:
    conversation = Conversation(system="Be brief.")
    for turn in range(turns):
        message = conversation.say(f"question {turn}", conversation.leaf)
        reply(conversation, message, f"answer {turn}")
    return conversation


def reply(conversation: Conversation, last: Message, text: str, start: tuple[int, int] = (0, 0)) -> None:
    replied = Replied(text, Piece(text, (1, 2)), Piece("q", (3,)), start, Cost(generated=2))
    conversation.take(last, new_id(), replied)


def texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.path]


def test_an_edit_is_a_branch_of_its_own() -> None:
    conversation = talked()
    second = conversation.path[2]
    edited = conversation.say("another", second.parent)
    reply(conversation, edited, "another answer")
    assert texts(conversation) == ["question 0", "answer 0", "another", "another answer"]
    assert [message.text for message in conversation.beside(edited)] == ["question 1", "another"]
    conversation.look_at(second.id)
    assert texts(conversation)[-1] == "answer 2"
    assert len(list(conversation.leaves())) == 2


def test_a_reply_made_again_stands_beside_the_first() -> None:
    conversation = talked(1)
    asked = conversation.path[0]
    reply(conversation, asked, "otherwise")
    assert texts(conversation) == ["question 0", "otherwise"]
    assert len(conversation.beside(conversation.path[1])) == 2


def test_a_reply_does_not_turn_the_user_away_from_another_branch() -> None:
    conversation = talked(2)
    asked = conversation.say("slow", conversation.leaf)
    conversation.look_at(conversation.path[0].id)
    conversation.leaf = conversation.path[1].id
    reply(conversation, asked, "late")
    assert texts(conversation) == ["question 0", "answer 0"]


def test_a_reply_that_was_not_begun_leaves_the_message_alone() -> None:
    conversation = Conversation()
    asked = conversation.say("hello", None)
    conversation.take(asked, new_id(), Replied("", None, None, (0, 0), Cost(), "stopped"))
    assert conversation.path == [asked]


def test_what_has_forgotten_is_told_from_what_has_not() -> None:
    conversation = talked(2)
    assert conversation.salt(conversation.path) is None
    asked = conversation.say("more", conversation.leaf)
    reply(conversation, asked, "less", start=(2, 2))
    assert conversation.salt(conversation.path) == (asked.id, 2)
    later = conversation.say("more", conversation.leaf)
    assert later.start == 2
    assert conversation.salt(conversation.path) == (asked.id, 2)
    reply(conversation, later, "at last", start=(2, 4))
    assert conversation.salt(conversation.path) == (conversation.leaf, 4)


def test_saved_and_read_again() -> None:
    conversation = talked()
    again = Conversation.of(json.loads(json.dumps(conversation.as_json())))
    assert again == conversation


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("messages"),
        lambda saved: saved.update(version=2),
        lambda saved: saved.update(leaf="nowhere"),
        lambda saved: saved["messages"][1].update(parent="nowhere"),
        lambda saved: saved["messages"][0].update(parent=saved["messages"][1]["id"]),
        lambda saved: saved["messages"][0].update(text=None),
        lambda saved: saved["messages"][0].update(surprise=1),
        lambda saved: saved["messages"][0].update(piece=["text", ["no number"]]),
    ],
)
def test_damage_is_refused(damage: Callable[[dict[str, Any]], object]) -> None:
    saved = talked().as_json()
    damage(saved)
    with pytest.raises(ValueError):
        Conversation.of(json.loads(json.dumps(saved)))


@pytest.mark.parametrize("saved", [None, [], "text", 3, {}])
def test_what_is_no_conversation_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError):
        Conversation.of(saved)


def test_control_characters_are_taken_out_and_scripts_are_not() -> None:
    assert cleaned("a\x1b[31mb\x00\r\nc\td\x9b\ud800") == "a[31mb\nc\td"
    assert cleaned("שלום 👩‍👩‍👧 مرحبا") == "שלום 👩‍👩‍👧 مرحبا"


def test_titles_are_short_and_of_one_line() -> None:
    assert titled("  a\nb\x1b ") == "a b"
    assert len(titled("word " * 50)) <= 40


def test_exported() -> None:
    conversation = talked(2)
    conversation.title = "What / is: this?"
    reply(conversation, conversation.say("last", conversation.leaf), "end", start=(2, 2))
    text = as_markdown(conversation)
    assert text.startswith("# What / is: this?\n\n> Be brief.\n\n**You**\n\nquestion 0")
    assert text.index("answer 0") < text.index("had forgotten what is above") < text.index("question 1")
    assert file_name(conversation).startswith("what-is-this-")
    assert "/" not in file_name(conversation)
    assert file_name(Conversation(title="…")).endswith(".md")
