"""Converts messages to tokens, reusing the tokens of messages read or generated before."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from .thinking import Marks, marks_of, parted


class Piece(NamedTuple):
    """A message as the model read or wrote it, including the template's text around it.

    Attributes:
        closing: the numbers of characters and tokens at the beginning that end the message before.
    """

    text: str
    tokens: tuple[int, ...]
    closing: tuple[int, int] = (0, 0)

    @property
    def body(self) -> Piece:
        """The piece without the text that ends the message before it."""
        characters, tokens = self.closing
        return Piece(self.text[characters:], self.tokens[tokens:])


LEAST = 8
"""The fewest characters at the end of a changed message that are taken for what is left of it."""

NOTHING = Piece("", ())


@dataclass(frozen=True)
class Turn:
    """A message to be read; `piece` is its earlier reading, if there is one."""

    role: str
    text: str
    piece: Piece | None = None


@dataclass(frozen=True)
class Context:
    """The text and tokens that the model reads before it answers.

    Attributes:
        opening: the system prompt.
        pieces: a piece for each turn, up to the first one whose reading has changed.
        rest: everything after these, newly encoded.
        is_whole: whether every turn has its own piece; the last one's is `rest`.
        is_changed: whether the template renders an earlier turn differently now, such as without its
            thinking.
    """

    opening: Piece
    pieces: tuple[Piece, ...]
    rest: Piece = NOTHING
    is_whole: bool = False
    is_changed: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for piece in (self.opening, *self.pieces, self.rest) for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in (self.opening, *self.pieces, self.rest))

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(piece.tokens) for piece in (self.opening, *self.pieces, self.rest))

    def tokens_of(self, turns: int) -> int | None:
        """The number of tokens in the first `turns` turns and their endings; None if unknown."""
        if len(self.pieces) < turns or not self.is_whole:
            return None
        following = self.pieces[turns] if turns < len(self.pieces) else self.rest
        return sum(len(piece.tokens) for piece in self.pieces[:turns]) + following.closing[1]

    def without(self, turns: int) -> Context:
        """The context without the first `turns` turns."""
        if turns < len(self.pieces):
            pieces = (self.pieces[turns].body, *self.pieces[turns + 1 :])
            return replace(self, pieces=pieces)
        return replace(self, pieces=(), rest=self.rest.body)


def compose(tokenizer: Any, system: str, turns: Sequence[Turn]) -> Context:
    """Make the context of a list of turns that ends with a turn of the user.

    Reuses the tokens of turns read or generated before, because encoding a text again can give
    other tokens. If the template renders only the end of an earlier turn now, this end is reused. If it
    renders the turn differently, everything from this turn on is encoded again.
    """
    text = rendered(tokenizer, system, turns)
    opening = _opening(tokenizer, system)
    if not text.startswith(opening.text):
        opening = NOTHING
    read = len(opening.text)
    pieces: list[Piece] = []
    is_changed = False
    for turn in turns:
        piece = turn.piece if pieces or turn.piece is None else turn.piece.body
        if piece is not None and not text.startswith(piece.text, read):
            is_changed, piece = True, _end_of(tokenizer, piece, text, read)
        if piece is None:
            break
        pieces.append(piece)
        read += len(piece.text)
    if len(pieces) == len(turns) and read < len(text):
        # The template now adds text after the last turn that its piece lacks.
        read -= len(pieces.pop().text)
    is_whole = len(pieces) >= len(turns) - 1
    before = rendered(tokenizer, system, turns[:-1], answer=False) if is_whole and len(turns) > 1 else ""
    rest = _piece(tokenizer, text, read, len(before) if text.startswith(before) else read)
    return Context(opening, tuple(pieces), rest, is_whole, is_changed)


def rendered(tokenizer: Any, system: str, turns: Sequence[Turn], answer: bool = True) -> str:
    """Render a conversation with the model's template, with the prefix of an answer if `answer` is true."""
    if not tokenizer.chat_template:
        return _plainly(system, turns, answer)
    refusals = []
    for messages in _forms(system, turns, marks_of(tokenizer)):
        try:
            return _template(tokenizer, messages, answer)
        except TemplateError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def encoded(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def _end_of(tokenizer: Any, piece: Piece, text: str, read: int) -> Piece | None:
    """The end of a piece that the text has at `read`, with its tokens; None if there is none."""
    first = text[read : read + 1]
    start = piece.text.find(first, 1) if first else -1
    while start > 0 and not text.startswith(piece.text[start:], read):
        start = piece.text.find(first, start + 1)
    left = piece.text[start:]
    if start < 0 or len(left) < LEAST:
        return None

    def decoded(index: int) -> str:
        decoded: str = tokenizer.decode(piece.tokens[index:], skip_special_tokens=False)
        return decoded

    index = bisect_left(range(len(piece.tokens)), -len(left), key=lambda index: -len(decoded(index)))
    if not left.endswith(decoded(index)):
        return None
    head = encoded(tokenizer, left.removesuffix(decoded(index)))
    return Piece(left, (*head, *piece.tokens[index:]))


def _piece(tokenizer: Any, text: str, start: int, begin: int) -> Piece:
    """Encode the text from `start` on. The part before `begin` ends an earlier message."""
    closing = encoded(tokenizer, text[start:begin])
    body = encoded(tokenizer, text[max(start, begin) :])
    return Piece(text[start:], (*closing, *body), (max(0, begin - start), len(closing)))


def _opening(tokenizer: Any, system: str) -> Piece:
    if not system:
        return NOTHING
    try:
        text = rendered(tokenizer, system, (), answer=False)
    except (TemplateError, IndexError):
        return NOTHING
    return Piece(text, tuple(encoded(tokenizer, text)))


def _forms(system: str, turns: Sequence[Turn], marks: tuple[Marks, ...]) -> Iterator[list[dict[str, str]]]:
    """The messages as templates take them: nearly all take the first form."""
    whole = [{"role": turn.role, "content": turn.text} for turn in turns]
    yield from _with_system(system, whole)
    # Some templates refuse replies that contain the marks of thinking, which has a field of its own there.
    apart = [
        _apart(turn, marks) if turn.role == "assistant" else each
        for turn, each in zip(turns, whole, strict=True)
    ]
    if apart != whole:
        yield from _with_system(system, apart)


def _with_system(system: str, messages: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    yield [{"role": "system", "content": system}, *messages] if system else messages
    if system and messages:
        # Some templates do not support a system prompt; it goes before the first message.
        yield [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]


def _apart(turn: Turn, marks: tuple[Marks, ...]) -> dict[str, str]:
    thought, answer = parted(turn.text, marks)
    return {"role": turn.role, "content": answer} | ({"thinking": thought} if thought else {})


def _template(tokenizer: Any, messages: list[dict[str, str]], answer: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    return text


def _plainly(system: str, turns: Sequence[Turn], answer: bool) -> str:
    """Render a conversation for a model without a template."""
    lines = [f"{system}\n\n"] if system else []
    lines += [f"{turn.role}: {turn.text}\n" for turn in turns]
    return "".join(lines) + ("assistant:" if answer else "")
