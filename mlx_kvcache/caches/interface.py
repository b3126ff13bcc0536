"""What a model and an application see of every kind."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from ..arguments import whole
from ..batch import Batch, CacheConfig, CausalOptions
from ..quantization import Quantization
from ..storage.masks import Mask

History = tuple[mx.array, mx.array, Mask]
"""Keys and values (1, n_kv_heads, S, head_dim), and who of the n tokens sees which of the S."""


@runtime_checkable
class Cache(Protocol):
    """What a model needs of a cache, and what an application does with one.

    A forward pass is `start_forward`, then for each layer `put` and `get`. Nothing evaluates
    an array, except `put` after `start_forward(reserve=True)`, and `start_forward` where buffers
    get longer. After any error the cache is as it was before the call.

    A range of positions that goes beyond the end of its sequence ends there: `copy_prefix` and `remove` take
    what there is of it, and an unknown sequence is one without tokens.
    """

    def set_config(self, config: CacheConfig) -> None:
        """Set the form in which history is returned; before `init`."""

    def init(
        self,
        dtype: mx.Dtype = ...,
        max_sequences: int = ...,
        capacity: int = ...,
        max_batch: int = ...,
        quantization: Quantization | None = ...,
        head_dim: int | None = ...,
    ) -> None:
        """Make room for `max_sequences * capacity` tokens, shared by all sequences."""

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Take the batch's tokens into their sequences; what belongs to them follows by `put`."""

    def forward(self, batch: Batch) -> AbstractContextManager[Any]:
        """`start_forward`, with an end: an exception, or a layer left out, takes the tokens out again."""
        ...

    def set_causal(self, options: CausalOptions) -> None:
        """Let some tokens of this batch see later ones, until the next `start_forward`."""

    def set_layer(self, layer: int) -> None:
        """Choose the model layer for `put` and `get`."""

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the batch's keys and values, each (1, n_kv_heads, n, head_dim), in batch order."""

    def get(self) -> Any:
        """History for this layer, the batch included: keys, values and mask."""
        ...

    def layer(self, layer: int) -> Any:
        """A handle on one model layer, with `put` and `get`."""
        ...

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Empty `dst` and let it share the positions of `src` below `length`, as far as there are any."""

    def can_resume(self, sequence: int, position: int) -> bool:
        """Whether all that tokens from `position` on may see below it is held."""
        ...

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """Take out the positions [begin, end), or all from `begin` on; later tokens move down."""

    def end(self, sequence: int) -> int:
        """The position after the sequence's last token; 0 if it is unknown."""
        ...

    def close(self) -> None:
        """Give all memory back."""


def slide(cache: Cache, sequence: int, keep: int = 0, discard: int | None = None) -> int:
    """Shift the context: drop tokens after the first `keep`, and re-base the rest.

    Args:
        keep: how many first tokens stay.
        discard: how many to drop, at most all after `keep`; None drops the older half of those, rounded
            down: `(end - keep) // 2`.

    Returns:
        How many tokens were dropped.

    Raises:
        ValueError: a negative number.
        NotSupportedError, CacheFullError: as `Cache.remove`.
    """
    sequence, keep = whole(sequence=sequence, keep=keep)
    end = cache.end(sequence)
    if discard is None:
        discard = max(0, end - keep) // 2
    (discard,) = whole(discard=discard)
    stop = min(keep + discard, end)
    if stop <= keep:
        return 0
    cache.remove(sequence, keep, stop)
    return stop - keep


def checked_range(sequence: int, begin: int, end: int | None) -> tuple[int, int, int | None]:
    """All three as ints. Raises ValueError unless [begin, end) can be positions; None is the end."""
    sequence, begin = whole(sequence=sequence, begin=begin)
    if end is None:
        return sequence, begin, None
    (end,) = whole(end=end)
    if end < begin:
        raise ValueError(f"cannot remove [{begin}, {end}): it ends before it begins")
    return sequence, begin, end
