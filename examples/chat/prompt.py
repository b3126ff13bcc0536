"""Prepares a reply: finds the cache of a branch, and forgets old messages if there is no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_kvcache import NotSupportedError
from mlx_kvcache.sessions import Session, SessionPool

from .reading import Context, Piece, Turn, compose, encoded
from .settings import Settings
from .thinking import begun_by, marks_of
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
        written: the tokens of a reply that is continued.
        turns: all messages of the branch.
        context: the remembered messages, as the model reads them.
        start: the number of forgotten messages at the beginning.
        read: the last message as the model reads it; None if it cannot be separated from the
            messages before it.
        opening: the mark of thinking with which the template begins the reply; "" if it does not.
        forgotten: the number of tokens that the model no longer sees.
    """

    session: Session
    turns: list[Turn]
    context: Context
    written: list[int]
    start: int
    read: Piece | None
    opening: str
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
    pool: SessionPool,
    tokenizer: Any,
    conversation: Conversation,
    path: Sequence[Message],
    name: str,
    settings: Settings,
) -> Prompt:
    """Open the cache that holds most of a branch, and make room for the reply.

    What follows a gap is kept: after forgotten messages by removing them from the cache, or by a splice
    where the model reads the others differently now, such as without their thinking.

    Args:
        path: the branch; it ends with a message of the user, or with a reply that is continued.
        name: the id of the reply's message.

    Raises:
        TooLong: there is no room, even if all earlier messages are forgotten.
    """
    turns = [message.turn for message in path]
    begun = turns.pop() if path[-1].role == "assistant" else None
    system, start, salt = conversation.system, path[-1].start, conversation.salt(list(path))
    before = compose(tokenizer, system, turns[start:])
    opening = begun_by(before.text, marks_of(tokenizer))
    written = _tokens_of(tokenizer, begun, opening) if begun else []
    goal, context, kept = _fitting(tokenizer, system, turns, start, before, written, settings)
    tokens, forgotten = context.tokens + kept, len(written) - len(kept)
    # Later replies on this branch find a cache without forgotten tokens under a name of its own.
    own = name if begun else path[-1].id, -forgotten or goal
    session: Session | None = None
    if goal == start and not forgotten:
        session = pool.open(tokens, salt, splice=SPLICE if before.is_changed else 0)
    elif not (before.is_changed or forgotten):
        session = _dropped(pool, before, written, salt, own, tokens)
    if session is None:
        session = pool.open(tokens, salt, splice=SPLICE)
        session.salt = own
    last = _last_piece(context, turns[-1])
    return Prompt(
        session, turns, context, written, goal, last, opening, before.length - context.length + forgotten
    )


def forget(prompt: Prompt, name: str) -> bool:
    """Remove the oldest remembered turn from the cache during a reply.

    If only the last message is left, half of what the model has written is removed.

    Args:
        name: the id of the reply's message.

    Returns:
        Whether there is room now.
    """
    later = [i for i, turn in enumerate(prompt.turns) if turn.role == "user" and i > prompt.start]
    if not later:
        begin, end = prompt.context.length, len(prompt.session.tokens)
        half = (end - begin) // 2
        if not _drop(prompt.session, begin, begin + half, (name, -end), None):
            return False
        prompt.forgotten += half
        return True
    turns = later[0] - prompt.start
    begin, cut = len(prompt.context.opening.tokens), prompt.context.tokens_of(turns)
    if cut is None or not _drop(prompt.session, begin, begin + cut, (name, later[0]), None):
        return False
    prompt.context = prompt.context.without(turns)
    prompt.start = later[0]
    prompt.forgotten += cut
    return True


def _fitting(
    tokenizer: Any,
    system: str,
    turns: list[Turn],
    start: int,
    context: Context,
    written: list[int],
    settings: Settings,
) -> tuple[int, Context, list[int]]:
    """Find the first message from which on there is room for a reply, and the context from there.

    Args:
        written: the tokens of the reply that are there already.

    Returns:
        The first message, the context, and the tokens of the reply that are kept. If only the last message is
        left and there is no room for the reply, these are its newest, half as many as there is room for.
    """
    if settings.capacity is None:
        return start, context, written
    room = min(settings.max_tokens, settings.capacity // 4)
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > start]
    for later in [start, *starts]:
        context = context if later == start else compose(tokenizer, system, turns[later:])
        if context.length + len(written) + room <= settings.capacity:
            return later, context, written
    needed = context.length + room
    if written and needed <= settings.capacity:
        return later, context, written[-((settings.capacity - context.length + 1) // 2) :]
    raise TooLong(
        f"with room for an answer this takes {needed:,} tokens, and the capacity is {settings.capacity:,}"
    )


def _tokens_of(tokenizer: Any, reply: Turn, opening: str) -> list[int]:
    return list(reply.piece.tokens) if reply.piece else encoded(tokenizer, reply.text.removeprefix(opening))


def _dropped(
    pool: SessionPool,
    before: Context,
    written: list[int],
    salt: tuple[str, int] | None,
    own: tuple[str, int],
    tokens: list[int],
) -> Session | None:
    """The session of a branch with its first turns removed from the cache; None if that is not possible."""
    session = pool.open(before.tokens + written, salt)
    begin = len(before.opening.tokens)
    if _drop(session, begin, begin + len(session.tokens) - len(tokens), own, tokens):
        return session
    session.close()
    return None


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
