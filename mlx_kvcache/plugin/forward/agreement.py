"""Makes the layers of a cache list, and the ranks of a model, act together.

`Told` runs an edit once although mlx-lm calls it on every layer. `forward_together` and `edit_together` run
a forward or an edit on all ranks or on none.

If a rank fails in a forward, undoing it frees the cells, but the arrays' graphs still hold its writes. Ranks
that stopped at different layers would hold different collectives, and evaluating an array later would wait
for data that the other ranks never send. So `unless_all_can` also restores the pool's arrays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from ...errors import CacheError
from ...storage.buffers import Buffers, Pair
from ..pool.conversation import Conversation
from ..pool.pool import Pool
from ..ranks import spelled, told_tokens

T = TypeVar("T")


class Told:
    """Runs a call once for all layers: the first layer runs it, the others get its result.

    Args:
        names: the names of all layers.
        strict: raise an error if layers are told different things, as for edits. Otherwise the result must
            be an object, and only a weak reference to it is kept for the other layers.
    """

    def __init__(self, names: Sequence[str], strict: bool) -> None:
        self._names = names
        self._strict = strict
        self._what: tuple[str, Any] = ("", None)
        self._result: Callable[[], Any] = _nothing
        self._heard: set[int] = set()

    def tell(self, layer: int, name: str, arguments: Any, act: Callable[[], T]) -> T:
        """Call `act`, or return its result if another layer was just told the same.

        Args:
            layer: the index of the layer.
            name: the name of the method.
            arguments: its arguments, compared by `==`. They are kept until all layers have been told the
                same or `forget` is called, so they must refer to objects by weak references only.
            act: makes the call for all layers.

        Raises:
            CacheError: the layers are told different edits.
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
                    f"layer {self._names[layer]} is told to {name} {arguments}, others to {other} {others}; "
                    "give all layers the same"
                )
        result = act()
        found = (lambda: result) if self._strict else weakref.ref(result)
        self._what, self._result, self._heard = what, found, {layer}
        self._forget_if_done()
        return result

    def forget(self) -> None:
        """Forget the current call: the next layer starts a new one."""
        self._what, self._result, self._heard = ("", None), _nothing, set()

    def _forget_if_done(self) -> None:
        if len(self._heard) == len(self._names):
            self.forget()


def _nothing() -> None:
    return None


def arrays_of(pool: Pool) -> list[mx.array]:
    """All arrays of a pool, among them those that the model's last calls wrote."""
    return pool.buffers + (pool.recurrent.arrays() if pool.layout.is_recurrent else [])


Kept = dict[int, tuple[Buffers, dict[int, Pair]]]
"""For each leaf its buffers, and copies of their pairs by segment."""


def keep(pool: Pool) -> Kept:
    """A copy of references to all arrays. Drop it before evaluating, or MLX copies arrays that it changes."""
    return {
        leaf: (buffers, buffers.copies())
        for _, cache in pool.positional()
        for leaf, buffers in cache._store.layers.items()
    }


def put_back(pool: Pool, kept: Kept) -> None:
    """Restore all arrays."""
    for _, cache in pool.positional():
        for leaf, buffers in cache._store.layers.items():
            buffers.pairs.clear()
            if leaf in kept and kept[leaf][0] is buffers:
                buffers.pairs.update(kept[leaf][1])


class Together(Protocol):
    """Conversations that share one input of the model."""

    pool: Pool
    conversations: list[Conversation]

    @property
    def positions(self) -> list[int]: ...


def forward_together(
    rows: Together, n: int, given: Iterable[Any], act: Callable[[], mx.array | None]
) -> mx.array | None:
    """Run a forward of the next n columns on all ranks, or on none.

    Args:
        given: the arguments of the model's call, whose tokens are compared with those of the other ranks. A
            single column is compared at the next vote: the device is still computing its token, and should
            get its next work meanwhile.
        act: runs the forward and returns the model's output, if there is one.
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
    """Restore the pool's arrays if a rank fails. Nothing is evaluated yet, so no rank waits for another."""
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
    """A section in which all ranks make an edit, or none.

    Args:
        about: describes the edit to the other ranks.
        is_sure: the edit cannot fail, so that ranks vote before it instead of during it.
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
    """The names of the conversations, the same on every rank."""
    return f"conversation {', '.join(conversation.name for conversation in rows.conversations)}"


def _tokens_of(given: Iterable[Any]) -> mx.array | None:
    """The tokens (B, n) among the arguments of the model's call, or None."""
    arrays = (value for value in given if isinstance(value, mx.array))
    return next((a for a in arrays if a.ndim == 2 and mx.issubdtype(a.dtype, mx.integer)), None)
