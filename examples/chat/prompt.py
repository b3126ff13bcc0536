"""Prepares a reply: finds the cache of a branch, and forgets old messages if there is no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_kvcache import NotSupportedError
from mlx_kvcache.sessions import Session, SessionPool

from .reading import Context, Piece, Turn, compose
from .settings import Settings
from .tree import Conversation, Message

SPLICE = 32
"""The fewest tokens of a run that is kept when tokens before it are gone."""


class TooLong(ValueError):
    """The message does not fit the capacity, even if all earlier messages are forgotten."""


@dataclass
class Prompt:
    """A branch and its cache, before and during a reply.

    Attributes:
        session: the cache, and the tokens to compute.
        turns: all messages of the branch.
        context: the remembered messages, as the model reads them.
        start: the number of forgotten messages at the beginning.
        read: the last message as the model reads it; None if it cannot be separated from the
            messages before it.
        forgotten: the number of tokens that the model no longer sees.
    """

    session: Session
    turns: list[Turn]
    context: Context
    start: int
    read: Piece | None
    forgotten: int = 0

    @property
    def gap(self) -> int | None:
        """The position at which messages are missing; None if none are."""
        return len(self.context.opening.tokens) if self.start else None


def remembered(tokenizer: Any, conversation: Conversation) -> tuple[Context, list[int]]:
    """The context of the current branch, and its tokens including a reply at the end."""
    path = conversation.path
    turns = [message.turn for message in path[path[-1].start :]]
    written = turns.pop().piece if turns[-1].role == "assistant" else None
    context = compose(tokenizer, conversation.system, turns)
    return context, context.tokens + list(written.tokens if written else ())


def prepare(
    pool: SessionPool, tokenizer: Any, conversation: Conversation, path: Sequence[Message], settings: Settings
) -> Prompt:
    """Open the cache that holds most of a branch, and make room for the reply.

    What follows a gap is kept: after forgotten messages by removing them from the cache, or by a splice
    where the model reads the others differently now, such as without their thinking.

    Args:
        path: the branch; it ends with a message of the user.

    Raises:
        TooLong: there is no room, even if all earlier messages are forgotten.
    """
    turns = [message.turn for message in path]
    system, start, salt = conversation.system, path[-1].start, conversation.salt(list(path))
    before = compose(tokenizer, system, turns[start:])
    goal, context = _fitting(tokenizer, system, turns, start, before, settings)
    name = (path[-1].id, goal)
    last = _last_piece(context, turns[-1])
    if goal == start:
        session = pool.open(before.tokens, salt, splice=SPLICE if before.is_changed else 0)
        return Prompt(session, turns, context, goal, last)
    cut = before.length - context.length
    if not before.is_changed:
        session = pool.open(before.tokens, salt)
        begin = len(before.opening.tokens)
        if _drop(session, begin, begin + cut, name, context.tokens):
            return Prompt(session, turns, context, goal, last, cut)
        session.close()
    session = pool.open(context.tokens, salt, splice=SPLICE)
    # Later replies on this branch find it under its own name.
    session.salt = name
    return Prompt(session, turns, context, goal, last, cut)


def forget(prompt: Prompt, name: str) -> bool:
    """Remove the oldest remembered turn from the cache during a reply.

    Args:
        name: the id of the reply's message.

    Returns:
        Whether a turn was removed.
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
    """Find the first message from which on there is room for a reply, and the context from there."""
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
    """Remove [begin, end) from a session if it is computed and the remaining tokens are as expected."""
    left = session.tokens[:begin] + session.tokens[end:]
    if not begin < end <= session.cache.position or (expected is not None and left != expected):
        return False
    try:
        session.remove(begin, end, salt)
    except NotSupportedError:
        return False
    return True
