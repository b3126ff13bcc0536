"""A conversation's cache, and how to make one for a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

import mlx.nn as nn

from ..cells.rules import Causal, Rule
from ..errors import NotSupportedError
from .bits import KvBits, KvFloat, quantisation_of
from .conversation import Conversation, Overflow
from .layers import entries_of
from .layout import layout_of
from .pool import Pool, pool_for
from .rows import Rows
from .trial import try_out


class PromptCache(list[Any]):
    """mlx-lm's prompt cache, a list with an object for each entry of the model's own, that can do more.

    Positions count tokens. After any error everything is as it was.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(entries_of(rows))
        self._rows = rows

    @property
    def pool(self) -> Pool:
        """The cells that this cache shares with its forks; `pool.nbytes` is what is allocated."""
        return self._rows.pool

    @property
    def position(self) -> int:
        """How many tokens are in the cache."""
        return self._rows.positions[0]

    @property
    def capacity(self) -> int | None:
        """How many tokens may be in the cache."""
        return self._conversation.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, what is shared with forks counted in full."""
        return sum(entry.nbytes for entry in entries_of(self._rows))

    def can_resume(self, position: int) -> bool:
        """Whether generation can go on from `position`, the tokens from there on dropped."""
        return 0 <= position <= self.position and self._rows.can_resume(position)

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` to continue from. Raises ValueError below 0."""
        if position < 0:
            raise ValueError(f"position must be 0 or more, got {position}")
        return self._rows.resume_point(min(position, self.position))

    def rewind(self, n: int) -> None:
        """Drop the newest n tokens.

        Raises:
            ValueError: not 0 <= n <= position.
            NotSupportedError: what the tokens before those need is not held; see `resume_point`.
        """
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot rewind {n} of {self.position} tokens")
        self._rewind_to(self.position - n)

    def rewind_to(self, position: int) -> None:
        """Drop the tokens from `position` on. Raises as `rewind`."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind {self.position} tokens to position {position}")
        self._rewind_to(position)

    def remove(self, begin: int, end: int | None = None) -> None:
        """Take out the tokens [begin, end); later ones move down and their keys are re-based.

        Raises:
            ValueError: a negative number, or begin > end.
            NotSupportedError: the model's position scheme is not understood, it has recurrent
                layers, or what the next token sees would not be held.
        """
        if begin < 0 or (end is not None and end < begin):
            raise ValueError(f"cannot remove [{begin}, {end}) of {self.position} tokens")
        stop = self.position if end is None else min(end, self.position)
        if begin >= stop:
            return
        if stop == self.position:
            self._rewind_to(begin)
        else:
            with self._rows.edit():
                self._conversation.remove(begin, stop)

    def fork(self) -> PromptCache:
        """A cache with the same tokens that goes its own way. Copies no array."""
        return PromptCache(self._rows.fork())

    def close(self) -> None:
        """Give the memory back that no fork shares. Further use is a CacheError."""
        self._conversation.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        return self.fork()

    def __iadd__(self, other: Iterable[Any]) -> list[Any]:  # type: ignore[override,misc]
        """A plain list: with the layers of a draft model behind it, it is no longer one conversation."""
        return [*self, *other]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise NotSupportedError("a prompt cache cannot be pickled")

    @property
    def _conversation(self) -> Conversation:
        return self._rows.conversation

    def _rewind_to(self, position: int) -> None:
        with self._rows.edit():
            self._conversation.rewind_to(position)


def make_prompt_cache(
    model: nn.Module,
    capacity: int | None = None,
    overflow: Overflow = "error",
    rewind: int = 64,
    sinks: int = 0,
    kv_bits: KvBits = None,
    kv_group_size: int = 64,
    kv_float: KvFloat = (),
    quantise_after: int = 0,
) -> PromptCache:
    """A prompt cache for an mlx-lm model, which answers every entry of the model's own in kind.

    Args:
        capacity: the most tokens that it holds; None grows without bound.
        overflow: what happens when more come. "error" raises CacheFullError before anything
            is computed; "shift" removes the older half after the first `sinks` tokens.
        rewind: how many newest tokens windows and chunks can always drop. Full attention can
            drop any; recurrences go back to their checkpoints (see `PromptCache.resume_point`).
        sinks: how many first tokens "shift" never removes.
        kv_bits: store keys and values in 8, 6, 5, 4, 3 or 2 bits; a pair for keys and values, in
            which None keeps one in float; or a function of the layer that returns one of these.
            None stores in the model's own precision.
        kv_group_size: 32, 64 or 128 features share a scale and a bias; heads must be multiples.
        kv_float: layers that stay in float all the same: indices, or "last".
        quantise_after: a cache stays in float until it holds more tokens than this.

    Raises:
        TypeError: not an mlx-lm model.
        ValueError: options out of range, or heads that groups do not divide.
        NotSupportedError: a layer of unknown kind, a model that asks more of its caches than
            these give, "shift" on a model whose tokens cannot be moved, sinks on one with
            recurrent layers.
    """
    if not isinstance(model, nn.Module) or not (hasattr(model, "layers") or hasattr(model, "make_cache")):
        raise TypeError(f"an mlx-lm model is needed, got {type(model).__name__}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    if overflow not in ("error", "shift"):
        raise ValueError(f'overflow must be "error" or "shift", got {overflow!r}')
    if rewind < 0:
        raise ValueError(f"rewind must be 0 or more, got {rewind}")
    if not 0 <= sinks < (capacity or sinks + 1):
        raise ValueError(f"sinks must be 0 or more and below the capacity of {capacity}, got {sinks}")
    layout = layout_of(model)
    shifts = capacity if overflow == "shift" else None
    if (shifts or sinks) and layout.is_recurrent:
        raise NotSupportedError(
            f'overflow="{overflow}" with sinks={sinks} on {type(model).__module__}: '
            "a recurrent state cannot forget tokens that later ones were added to, nor keep some of them"
        )
    pool = pool_for(model, layout, [_rewind(rule, rewind, shifts) for rule in layout.rules], None)
    try_out(pool)
    quantisation = quantisation_of(layout, pool.mirrored, kv_bits, kv_group_size, kv_float, quantise_after)
    if quantisation:
        pool = pool.sibling(quantisation)
    if shifts and pool.scheme.refusal:
        raise NotSupportedError(f'overflow="shift": {pool.scheme.refusal}')
    return PromptCache(Rows(pool, [Conversation(pool, capacity, overflow, sinks)], is_batch=False))


def _rewind(rule: Rule | None, rewind: int, capacity: int | None) -> int:
    """How many newest tokens a kind of layer can drop, in a cache that shifts within `capacity`, or not."""
    if rule is None or isinstance(rule, Causal):
        return 1
    if capacity is not None and capacity <= 4 * rule.size:
        # After a shift the window may reach over the gap, so nothing that stays may be forgotten.
        return capacity
    return max(1, rewind)
