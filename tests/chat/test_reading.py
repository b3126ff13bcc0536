"""From messages to tokens, by templates of several sorts."""

from __future__ import annotations

import copy
from typing import Any

from examples.chat.reading import Piece, Turn, compose, encoded, rendered

SYSTEM = "Be brief."


def asked(text: str, piece: Piece | None = None) -> Turn:
    return Turn("user", text, piece)


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.copy(tokenizer)
    object.__setattr__(other, "_tokenizer", copy.copy(tokenizer._tokenizer))
    other._tokenizer.chat_template = template
    return other


def test_what_was_read_is_taken_as_it_was(tokenizer: Any) -> None:
    first = compose(tokenizer, SYSTEM, [asked("Hello")])
    assert first.pieces == ()
    assert first.is_whole
    odd = (9, 9, 9)
    turns = [
        asked("Hello", Piece(first.rest.text, odd)),
        Turn("assistant", "Hi", Piece("Hi<|im_end|>", (5,))),
    ]
    second = compose(tokenizer, SYSTEM, [*turns, asked("Bye")])
    assert second.tokens[: len(first.opening.tokens) + 4] == [*first.opening.tokens, *odd, 5]
    assert second.is_whole
    whole = rendered(tokenizer, SYSTEM, [*turns, asked("Bye")])
    assert second.opening.text + "".join(p.text for p in second.pieces) + second.rest.text == whole


def test_the_same_text_gives_the_same_tokens_in_pieces(tokenizer: Any) -> None:
    context = compose(tokenizer, SYSTEM, [asked("How are you?")])
    assert context.tokens == encoded(tokenizer, rendered(tokenizer, SYSTEM, [asked("How are you?")]))


def test_another_system_prompt_leaves_the_messages_pieces(tokenizer: Any) -> None:
    piece = compose(tokenizer, SYSTEM, [asked("Hello")]).rest
    other = compose(tokenizer, "Be kind.", [asked("Hello", piece)])
    assert other.pieces == (piece,)
    assert other.rest.tokens == ()


def test_after_a_changed_message_all_is_read_anew(tokenizer: Any) -> None:
    piece = compose(tokenizer, SYSTEM, [asked("Hello")]).rest
    turns = [asked("Hullo", piece), Turn("assistant", "Hi", Piece("Hi", (5,))), asked("Bye")]
    context = compose(tokenizer, SYSTEM, turns)
    assert context.pieces == ()
    assert not context.is_whole


def test_a_template_without_system_prompts(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    other = with_template(tokenizer, template)
    context = compose(other, SYSTEM, [asked("Hello")])
    assert context.opening.text == ""
    assert context.rest.text == f"<user>{SYSTEM}\n\nHello"


def test_no_template(tokenizer: Any) -> None:
    context = compose(with_template(tokenizer, None), SYSTEM, [asked("Hello")])
    assert context.opening.text + context.rest.text == f"{SYSTEM}\n\nuser: Hello\nassistant:"
