"""A conversation's cache, and how to make one for a model."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..errors import NotSupportedError
from .layer import LayerCache
from .pool import Pool
from .state import Overflow, SequenceState


class PromptCache(list[LayerCache]):
    """mlx-lm's prompt cache, a list with an object for each layer, that can do more.

    Positions count tokens. After any error everything is as it was.
    """

    def __init__(self, state: SequenceState) -> None:
        super().__init__(LayerCache(state, index) for index in range(state.pool.layers))
        self._state = state
        state.serve(list(self))

    @property
    def pool(self) -> Pool:
        """The cells that this cache shares with its forks; `pool.nbytes` is what is allocated."""
        return self._state.pool

    @property
    def position(self) -> int:
        """How many tokens are in the cache."""
        return self._state.position

    @property
    def capacity(self) -> int | None:
        """How many tokens may be in the cache."""
        return self._state.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the K and V that are held, what is shared with forks counted in full."""
        return self._state.nbytes

    def can_resume(self, position: int) -> bool:
        """Whether generation can go on from `position`, the tokens from there on dropped."""
        return 0 <= position <= self.position

    def resume_point(self, position: int) -> int:
        """The newest position <= `position` to continue from. Raises ValueError below 0."""
        if position < 0:
            raise ValueError(f"position must be 0 or more, got {position}")
        return min(position, self.position)

    def rewind(self, n: int) -> None:
        """Drop the newest n tokens. Raises ValueError unless 0 <= n <= position."""
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot rewind {n} of {self.position} tokens")
        self._state.rewind_to(self.position - n)

    def rewind_to(self, position: int) -> None:
        """Drop the tokens from `position` on. Raises ValueError unless 0 <= position <= self.position."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind {self.position} tokens to position {position}")
        self._state.rewind_to(position)

    def remove(  # type: ignore[override]  # positions, not elements of the list
        self, begin: int, end: int | None = None
    ) -> None:
        """Take out the tokens [begin, end); later ones move down and their keys are re-based.

        Raises:
            ValueError: a negative number, or begin > end.
            NotSupportedError: the model's position scheme is not understood.
        """
        if begin < 0 or (end is not None and end < begin):
            raise ValueError(f"cannot remove [{begin}, {end}) of {self.position} tokens")
        stop = self.position if end is None else min(end, self.position)
        if begin >= stop:
            return
        if stop == self.position:
            self._state.rewind_to(begin)
        else:
            self._state.remove(begin, stop)

    def fork(self) -> PromptCache:
        """A cache with the same tokens that goes its own way. Copies no K or V."""
        return PromptCache(self._state.fork())

    def close(self) -> None:
        """Give the memory back that no fork shares. Further use is a CacheError."""
        self._state.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        return self.fork()


def make_prompt_cache(
    model: nn.Module,
    capacity: int | None = None,
    overflow: Overflow = "error",
    rewind: int = 64,
    sinks: int = 0,
    kv_bits: int | None = None,
) -> PromptCache:
    """A prompt cache for an mlx-lm model.

    Args:
        capacity: the most tokens that it holds; None grows without bound.
        overflow: what happens when more come. "error" raises CacheFullError before anything
            is computed; "shift" removes the older half after the first `sinks` tokens.
        rewind: how many newest tokens can always be dropped. Full attention can drop any.
        sinks: how many first tokens "shift" never removes.
        kv_bits: None, as K and V are stored in the model's own precision.

    Raises:
        TypeError: not an mlx-lm model.
        ValueError: options out of range.
        NotSupportedError: a layer that is not of full attention, "shift" on a model whose
            tokens cannot be moved, or kv_bits.
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
    if kv_bits is not None:
        raise NotSupportedError(f"kv_bits={kv_bits}: K and V are stored in the model's own precision")
    pool = Pool(model, _count_layers(model))
    if overflow == "shift" and capacity is not None and pool.scheme.refusal:
        raise NotSupportedError(f'overflow="shift": {pool.scheme.refusal}')
    return PromptCache(SequenceState(pool, capacity, overflow, sinks))


def _count_layers(model: nn.Module) -> int:
    """How many entries the model's cache has; all must be of full attention."""
    if not hasattr(model, "make_cache"):
        return len(model.layers)
    entries = model.make_cache()
    for index, entry in enumerate(entries):
        if type(entry).__name__ != "KVCache":
            raise NotSupportedError(
                f"layer {index} of {type(model).__module__} caches by {type(entry).__name__}; "
                "layers of full attention (KVCache) are supported"
            )
    return len(entries)
