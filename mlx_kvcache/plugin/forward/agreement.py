"""Runs an edit once although mlx-lm calls it on every layer.

What a pool has stored, kept for a moment so that a forward leaves nothing behind.

A forward that is taken back frees its cells, but what was to be written there stays in the arrays'
graphs. Of ranks that came to different points of a model, these graphs hold different collectives,
and whoever evaluates an array later would wait for what the others never send.


What the ranks of a model tell each other about the rows of a cache list.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from ...caches.recurrent import RecurrentCache
from ...errors import CacheError
from ...storage.buffers import AnyPair, Buffers
from ..pool.conversation import Conversation
from ..pool.pool import Pool
from ..ranks import spelled, told_tokens

T = TypeVar("T")


class Told:
    """The first layer that is told something does it for all; the others learn the result.

    Args:
        names: of all layers.
        strict: whether layers that are told different things are an error, as edits are. Otherwise
            what is done gives an object, which is not kept alive for the other layers.
    """

    def __init__(self, names: Sequence[str], strict: bool) -> None:
        self._names = names
        self._strict = strict
        self._what: tuple[str, Any] = ("", None)
        self._result: Callable[[], Any] = _nothing
        self._heard: set[int] = set()

    def tell(self, layer: int, name: str, arguments: Any, act: Callable[[], T]) -> T:
        """Do it, or return what it gave when another layer was told the same.

        Args:
            arguments: anything with `==`. They are kept until all layers have been told the same or
                `forget` is called, so let them hold objects by weak references only.

        Raises:
            CacheError: edits differ from layer to layer.
        """
        what = name, arguments
        if self._heard and layer not in self._heard:
            before = self._result()
            if what == self._what and (self._strict or before is not None):
                self._heard.add(layer)
                self._forget_if_done()
                return before  # type: ignore[no-any-return]
            if self._strict:
                other, others = self._what
                raise CacheError(
                    f"layer {self._names[layer]} is told to {name} {arguments}, others to {other} {others}"
                )
        result = act()
        found = (lambda: result) if self._strict else weakref.ref(result)
        self._what, self._result, self._heard = what, found, {layer}
        self._forget_if_done()
        return result

    def forget(self) -> None:
        """Whatever layers have been told is done with."""
        self._what, self._result, self._heard = ("", None), _nothing, set()

    def _forget_if_done(self) -> None:
        if len(self._heard) == len(self._names):
            self.forget()


def _nothing() -> None:
    return None


def arrays_of(pool: Pool) -> list[mx.array]:
    """All that the model's last calls have written: keys, values, and the newest state of each recurrence."""
    states = [
        array
        for cache in pool.caches
        if isinstance(cache, RecurrentCache)
        for stream in cache._streams.values()
        for arrays in stream.states.get(stream.end, {}).values()
        for array in arrays
        if array is not None
    ]
    return pool.buffers + states


Kept = dict[int, tuple[Buffers, dict[int, AnyPair]]]
"""By leaf: its buffers, and copies of their pairs by segment."""


def keep(pool: Pool) -> Kept:
    """All arrays as they are. Let go of it before anything is evaluated, or MLX copies what it changes."""
    return {
        leaf: (buffers, {segment: pair.copy() for segment, pair in buffers.pairs.items()})
        for _, cache in pool.positional()
        for leaf, buffers in cache._store.layers.items()
    }


def put_back(pool: Pool, kept: Kept) -> None:
    """Make all arrays what they were."""
    for _, cache in pool.positional():
        for leaf, buffers in cache._store.layers.items():
            buffers.pairs.clear()
            if leaf in kept and kept[leaf][0] is buffers:
                buffers.pairs.update(kept[leaf][1])


class Together(Protocol):
    """Conversations that go through the model together."""

    pool: Pool
    conversations: list[Conversation]

    @property
    def positions(self) -> list[int]: ...


def forward_together(
    rows: Together, n: int, given: Iterable[Any], act: Callable[[], mx.array | None]
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
def edit_together(rows: Together, about: str, is_sure: bool) -> Iterator[None]:
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


def named(rows: Together) -> str:
    """Which conversations these are, in words that are the same on every rank."""
    return f"conversation {', '.join(conversation.name for conversation in rows.conversations)}"


def _tokens_of(given: Iterable[Any]) -> mx.array | None:
    """The tokens (B, n) that the model is given, if it is given any."""
    arrays = (value for value in given if isinstance(value, mx.array))
    return next((a for a in arrays if a.ndim == 2 and mx.issubdtype(a.dtype, mx.integer)), None)
