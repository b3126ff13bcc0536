"""Splices: a conversation goes on to other tokens and keeps the runs that both have in common.

The cache keeps the common prefix. Every other run waits until the tokens before it are computed, and then
joins with its keys re-based. Its keys and values stay as they were computed, after other tokens, so what
comes after it differs slightly from a fresh computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...alignment import Run, common_runs
from ...cells.spans import Span, clip, moved, resumable
from ...errors import CacheFullError, NotSupportedError
from .conversation import Conversation, Graft


@dataclass(frozen=True)
class Splice:
    """What a cache keeps of its tokens when it goes on to others.

    Attributes:
        runs: the runs that are kept, the common prefix first: `before` and `after` are their positions.
        pieces: the positions of the tokens to compute, in order, as ranges between the runs.
        rest: the tokens to compute, in order. Pass them to the model in one block or several.
        refusal: why runs after the prefix are not kept, or None.
    """

    runs: tuple[Run, ...]
    pieces: tuple[range, ...]
    rest: list[int]
    refusal: str | None = None

    @property
    def kept(self) -> int:
        """The number of tokens that are not computed again."""
        return sum(run.length for run in self.runs)

    @property
    def moved(self) -> int:
        """The number of kept tokens after the common prefix."""
        return sum(run.length for run in self.runs if not run.is_prefix)


def plan_splice(
    conversation: Conversation,
    before: Sequence[int],
    after: Sequence[int],
    min_run: int,
    recompute: float = 0.0,
) -> Splice:
    """Plan how a conversation that holds the tokens `before` goes on to `after`, and change nothing.

    A run that cannot join becomes tokens to compute. At least one token is left to compute.
    """
    found = common_runs(before, after, min_run)
    prefix = found.pop(0).length if found and found[0].is_prefix else 0
    start = conversation.pool.resume_point(conversation.sequence, min(prefix, len(after) - 1))
    kept = [Run(0, 0, start)] if start else []
    refusal = None
    try:
        kept += _joining(conversation, start, _moving(found, len(after) - 1, recompute))
    except NotSupportedError as error:
        refusal = str(error)
    pieces = tuple(_between(0, [(run.after, run.length) for run in kept], len(after)))
    return Splice(tuple(kept), pieces, [after[i] for piece in pieces for i in piece], refusal)


def splice(conversation: Conversation, after: Sequence[int], planned: Splice) -> None:
    """Make a planned splice: go back to the common prefix, and let the other runs wait to join.

    Raises:
        CacheFullError: the tokens exceed the capacity.
    """
    capacity = conversation.limits.capacity
    if capacity is not None and len(after) > capacity:
        raise CacheFullError(len(after), capacity, capacity, "pass fewer tokens, or raise the capacity")
    start = sum(run.length for run in planned.runs if run.is_prefix)
    source = conversation.fork()
    waiting, text = conversation.waiting, conversation.text
    conversation.waiting = ()
    joining = [run for run in planned.runs if not run.is_prefix]
    try:
        conversation.rewind_to(start)
        conversation.text = tuple(after) if joining else None
        if joining:
            conversation.waiting = tuple(
                Graft(run.after, source, run.before, run.before + run.length) for run in joining
            )
            conversation.join_waiting(early=True)
    except BaseException:
        conversation.pool.copy(source.sequence, conversation.sequence)
        conversation.head, conversation.waiting, conversation.text = source.head, waiting, text
        raise


def left_to_compute(conversation: Conversation) -> list[list[int]]:
    """Return the tokens that a splice has left, divided where others join. None if the text is complete."""
    text = conversation.text or ()
    return [list(text[piece.start : piece.stop]) for piece in to_compute(conversation)]


def to_compute(conversation: Conversation) -> list[range]:
    """Return the positions of the tokens that a splice has left, divided where others join."""
    joining = [(own.position, own.length) for own in conversation.waiting]
    return list(_between(conversation.position, joining, len(conversation.text or ())))


def _moving(runs: Sequence[Run], end: int, recompute: float) -> Iterator[Run]:
    """Yield the runs without what is computed anyway: their first tokens, and those from `end` on."""
    for run in runs:
        run = run.skipping(math.ceil(recompute * run.length))
        run = run._replace(length=min(run.length, end - run.after))
        if run.length > 0:
            yield run


def _joining(conversation: Conversation, start: int, runs: Iterator[Run]) -> Iterator[Run]:
    """Yield those of the runs after which all layers hold what the next token sees.

    Raises NotSupportedError if the model's keys cannot be moved.
    """
    tables = [
        (cache._rule, cache._table[conversation.sequence].spans)
        for _, cache in conversation.pool.positional()
    ]
    held, position = [clip(spans, 0, start) for _, spans in tables], start
    for run in runs:
        conversation.check_joins(conversation, run.after, run.before, run.before + run.length)
        end, by = run.after + run.length, run.after - run.before
        computed = (Span(-1, 0, position, run.after - position),) if run.after > position else ()
        then = [
            (*own, *computed, *moved(clip(spans, run.before, run.before + run.length), by))
            for own, (_, spans) in zip(held, tables, strict=True)
        ]
        if all(resumable(rule, own, end) for own, (rule, _) in zip(then, tables, strict=True)):
            held, position = then, end
            yield run


def _between(begin: int, runs: Iterable[tuple[int, int]], end: int) -> Iterator[range]:
    """Yield the ranges of positions in [begin, end) that no run (position, length) covers."""
    for position, length in [*runs, (end, 0)]:
        if begin < position:
            yield range(begin, position)
        begin = position + length
