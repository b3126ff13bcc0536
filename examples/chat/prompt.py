"""What is left to read before a reply, and what has to be forgotten for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_kvcache import NotSupportedError
from mlx_kvcache.sessions import Session, SessionPool

from .reading import Context, Piece, Turn, compose
from .settings import Settings
from .tree import Conversation, Message


class TooLong(ValueError):
    """A message that cannot fit even an otherwise empty conversation."""


@dataclass
class Prompt:
    """A conversation on its cache, before and while it is answered.

    Attributes:
        session: the cache, and the tokens to compute.
        turns: all messages of the branch.
        context: those that are remembered, as they are read.
        start: how many of the first are forgotten.
        read: how the last message is read; None where it cannot be told from those before it.
        forgotten: tokens that were taken out of the cache.
    """

    session: Session
    turns: list[Turn]
    context: Context
    start: int
    read: Piece | None
    forgotten: int = 0

    @property
    def gap(self) -> int | None:
        """The position at which messages are missing; None where all are remembered."""
        return len(self.context.opening.tokens) if self.start else None


def remembered(tokenizer: Any, conversation: Conversation) -> tuple[Context, list[int]]:
    """What the model reads of the branch that is looked at, and all tokens of it, a reply at the end too."""
    path = conversation.path
    turns = [message.turn for message in path[path[-1].start :]]
    written = turns.pop().piece if turns[-1].role == "assistant" else None
    context = compose(tokenizer, conversation.system, turns)
    return context, context.tokens + list(written.tokens if written else ())


def prepare(
    pool: SessionPool, tokenizer: Any, conversation: Conversation, path: Sequence[Message], settings: Settings
) -> Prompt:
    """Find the cache that has most of a branch, which ends with a message of the user, and make room.

    Raises:
        TooLong: there can be none.
    """
    turns = [message.turn for message in path]
    system, start, salt = conversation.system, path[-1].start, conversation.salt(list(path))
    before = compose(tokenizer, system, turns[start:])
    goal, context = _fitting(tokenizer, system, turns, start, before, settings)
    session = pool.open(before.tokens, salt)
    prompt = Prompt(session, turns, context, goal, _last_piece(context, turns[-1]))
    if goal > start:
        cut = before.tokens_of(goal - start)
        begin = len(before.opening.tokens)
        name = (path[-1].id, goal)
        if cut is not None and _drop(session, begin, begin + cut, name, context.tokens):
            prompt.forgotten = cut
        else:
            session.close()
            prompt.session = pool.open(context.tokens, name)
    return prompt


def forget(prompt: Prompt, name: str) -> bool:
    """Take the oldest remembered turn out of the cache of a reply under way.

    Args:
        name: the reply's.

    Returns:
        Whether there was one that could be.
    """
    later = [i for i, turn in enumerate(prompt.turns) if turn.role == "user" and i > prompt.start]
    if not later:
        return False
    turns = later[0] - prompt.start
    begin, cut = len(prompt.context.opening.tokens), prompt.context.tokens_of(turns)
    if cut is None or not _drop(prompt.session, begin, begin + cut, (name, later[0]), None):
        return False
    prompt.context = prompt.context.without(turns)
    prompt.start = later[0]
    prompt.forgotten += cut
    return True


def _fitting(
    tokenizer: Any, system: str, turns: list[Turn], start: int, context: Context, settings: Settings
) -> tuple[int, Context]:
    """From which message on there is room for a reply, and what is read then."""
    if settings.capacity is None:
        return start, context
    room = min(settings.max_tokens, settings.capacity // 4)
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > start]
    for later in [start, *starts]:
        context = context if later == start else compose(tokenizer, system, turns[later:])
        needed = context.length + room
        if needed <= settings.capacity:
            return later, context
    raise TooLong(
        f"with room for an answer this takes {needed:,} tokens, and the capacity is {settings.capacity:,}"
    )


def _last_piece(context: Context, last: Turn) -> Piece | None:
    if not context.is_whole:
        return None
    return context.rest if context.rest.text else last.piece


def _drop(session: Session, begin: int, end: int, salt: tuple[str, int], expected: list[int] | None) -> bool:
    """Take [begin, end) out of a session, if it has been computed and what is left is as expected."""
    left = session.tokens[:begin] + session.tokens[end:]
    if end > session.cache.position or (expected is not None and left != expected):
        return False
    try:
        session.remove(begin, end, salt)
    except NotSupportedError:
        return False
    return True
