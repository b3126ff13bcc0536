"""What the ranks of a model tell each other about the rows of a cache list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .pool import Pool
from .records import spelled, told_tokens
from .written import arrays_of, keep, put_back

if TYPE_CHECKING:
    from .rows import Rows


def forward_together(
    rows: Rows, n: int, given: Iterable[Any], act: Callable[[], mx.array | None]
) -> mx.array | None:
    """Take the next n columns in on all ranks, or on none.

    Args:
        given: the arguments of the model's call; its tokens are compared with the other ranks'.
            Those of a single column wait for the next vote: the device is still at work on them,
            and should get its next work meanwhile.
        act: does it, and gives the model's output.
    """
    ranks = rows.pool.ranks
    if ranks.is_alone:
        return act()
    ranks.enqueue(arrays_of(rows.pool))
    positions, tokens = rows.positions, _tokens_of(given)
    about = f"take in {n} tokens at {spelled(positions)} of {named(rows)}"
    if tokens is not None and n > 1:
        about += f": {told_tokens(tokens)}"
    with ranks.together(about):
        output = act()
    ranks.passed(tokens if n == 1 else None, positions, output)
    return output


@contextmanager
def unless_all_can(pool: Pool) -> Iterator[None]:
    """What is written inside is taken back where a rank fails. MLX computes later, so none waits yet."""
    if pool.ranks.is_alone:
        yield
        return
    kept = keep(pool)
    try:
        yield
        pool.ranks.ready()
    except BaseException:
        put_back(pool, kept)
        raise
    finally:
        kept.clear()


@contextmanager
def edit_together(rows: Rows, about: str, is_sure: bool) -> Iterator[None]:
    """A section in which all ranks edit, or none.

    Args:
        is_sure: it can be done, so that ranks need no more than to agree on it.
    """
    ranks = rows.pool.ranks
    if ranks.is_alone:
        yield
        return
    ranks.enqueue(arrays_of(rows.pool))
    with ranks.together(f"{about} at {spelled(rows.positions)} of {named(rows)}"):
        if is_sure:
            ranks.ready()
        yield


def named(rows: Rows) -> str:
    """Which conversations these are, in words that are the same on every rank."""
    return f"conversation {', '.join(conversation.name for conversation in rows.conversations)}"


def _tokens_of(given: Iterable[Any]) -> mx.array | None:
    """The tokens (B, n) that the model is given, if it is given any."""
    arrays = (value for value in given if isinstance(value, mx.array))
    return next((a for a in arrays if a.ndim == 2 and mx.issubdtype(a.dtype, mx.integer)), None)
