"""From messages to tokens: what the model reads, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError


class Piece(NamedTuple):
    """A message as the model read or wrote it, with all that its template puts around it."""

    text: str
    tokens: tuple[int, ...]


NOTHING = Piece("", ())


@dataclass(frozen=True)
class Turn:
    """A message to be read: who says it, what, and how it was read before, if it was."""

    role: str
    text: str
    piece: Piece | None = None


@dataclass(frozen=True)
class Context:
    """What the model reads before it answers.

    Attributes:
        opening: the system prompt.
        pieces: one for each turn, or those before the first whose reading has changed.
        rest: what comes behind them, encoded anew.
        is_whole: every turn has its piece, `rest` the last one's.
    """

    opening: Piece
    pieces: tuple[Piece, ...]
    rest: Piece = NOTHING
    is_whole: bool = field(default=False)

    @property
    def tokens(self) -> list[int]:
        return [token for piece in (self.opening, *self.pieces, self.rest) for token in piece.tokens]

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return sum(len(piece.tokens) for piece in (self.opening, *self.pieces, self.rest))


def compose(tokenizer: Any, system: str, turns: Sequence[Turn]) -> Context:
    """What the model reads of these turns, the last of them the user's.

    Tokens that were read or written before are taken as they were: encoding a text again can
    give others. Where a template changes what it made of earlier turns, all from there on is
    encoded anew.
    """
    text = rendered(tokenizer, system, turns)
    opening = _opening(tokenizer, system)
    if not text.startswith(opening.text):
        opening = NOTHING
    read = len(opening.text)
    pieces: list[Piece] = []
    for turn in turns:
        if turn.piece is None or not text.startswith(turn.piece.text, read):
            break
        pieces.append(turn.piece)
        read += len(turn.piece.text)
    if len(pieces) == len(turns) and read < len(text):
        # The last turn was read with less behind it than the template puts there now.
        read -= len(pieces.pop().text)
    rest = Piece(text[read:], tuple(encoded(tokenizer, text[read:])))
    return Context(opening, tuple(pieces), rest, len(pieces) >= len(turns) - 1)


def rendered(tokenizer: Any, system: str, turns: Sequence[Turn], answer: bool = True) -> str:
    """The template's text of a conversation, up to where the model answers."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if not tokenizer.chat_template:
        return _plainly(system, turns, answer)
    before = [{"role": "system", "content": system}] if system else []
    try:
        return _template(tokenizer, before + messages, answer)
    except TemplateError:
        if not (system and messages):
            raise
        # Some templates know no system prompt.
        first = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
        return _template(tokenizer, [first, *messages[1:]], answer)


def encoded(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def _opening(tokenizer: Any, system: str) -> Piece:
    if not system:
        return NOTHING
    try:
        text = rendered(tokenizer, system, (), answer=False)
    except (TemplateError, IndexError):
        return NOTHING
    return Piece(text, tuple(encoded(tokenizer, text)))


def _template(tokenizer: Any, messages: list[dict[str, str]], answer: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    return text


def _plainly(system: str, turns: Sequence[Turn], answer: bool) -> str:
    """For models without a template."""
    lines = [f"{system}\n\n"] if system else []
    lines += [f"{turn.role}: {turn.text}\n" for turn in turns]
    return "".join(lines) + ("assistant:" if answer else "")
