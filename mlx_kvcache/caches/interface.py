"""The `Cache` protocol, which models and applications use, and `slide`, which shifts a context with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import mlx.core as mx

from ..arguments import whole
from ..batch import Batch, CacheConfig, CausalOptions
from ..quantization import Quantization
from ..storage.masks import Mask

History = tuple[mx.array, mx.array, Mask]
"""Keys (1, n_kv_heads, S, head_dim), values (1, n_kv_heads, S, value_dim), and their mask."""


Recurrent = Literal["refuse", "keep", "replay"]
"""What a removal from the middle does with recurrent states; see `Cache.remove`."""


@runtime_checkable
class Cache(Protocol):
    """The interface that all caches of this package share.

    A cache holds the keys and values of many sequences. A sequence is named by an int >= 0 and needs no
    registration: it exists while it holds tokens. Its tokens have positions 0, 1, 2 and so on.

    A model runs one forward pass over a `Batch` of new tokens, which may belong to several sequences:

    ```python
    with cache.forward(batch):  # adds the tokens to their sequences
        for i in range(n_layers):
            ...  # project queries, keys and values of the new tokens; apply RoPE
            cache.layer(i).put(keys, values)
            keys, values, mask = cache.layer(i).get()  # the history, new tokens included
            ...  # attend
    ```

    `mlx_kvcache.attention` does `put`, `get` and the attention in one call. Between forward passes an
    application edits sequences with `copy_prefix` and `remove`.

    A call that raises leaves the cache unchanged. Arrays stay lazy: only `start_forward` (when buffers
    grow) and `put` after `start_forward(reserve=True)` evaluate any. A range of positions that reaches
    beyond the end of a sequence is cut there.
    """

    def set_config(self, config: CacheConfig) -> None:
        """Choose the form of the mask and the padding that `get` returns. Call it before `init`."""

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
        """Begin a forward pass without the check at the end that `forward` makes."""

    def forward(self, batch: Batch) -> AbstractContextManager[Any]:
        """Add the batch's tokens to their sequences, and run a forward pass in a `with` block.

        If the block raises, or leaves out a layer that earlier batches put, the tokens are removed again.
        """
        ...

    def set_causal(self, options: CausalOptions) -> None:
        """Let some tokens of the current batch see later ones, until the next `start_forward`."""

    def set_layer(self, layer: int) -> None:
        """Choose the model layer for `put` and `get`."""

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the keys and values (1, n_kv_heads, n, head_dim) of the batch's n tokens, after RoPE."""

    def get(self) -> Any:
        """Return the current layer's keys, values and mask for attention, the batch's own tokens included."""
        ...

    def layer(self, layer: int) -> Any:
        """Return a handle on one model layer, with `put` and `get`."""
        ...

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Replace sequence `dst` by the first `length` tokens of `src`. Both share the stored arrays."""

    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether the next forward pass may continue the sequence at `position`."""
        ...

    def remove(
        self, sequence: int, begin: int, end: int | None = None, recurrent: Recurrent = "refuse"
    ) -> None:
        """Remove the tokens at positions [begin, end), or all from `begin` on if `end` is None.

        Later tokens move down by `end - begin` positions, and their keys are re-based (RoPE). `recurrent`
        says what happens to later recurrent states.
        """

    def graft(
        self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent = "refuse"
    ) -> None:
        """Append the tokens [begin, end) of sequence `source` to another sequence, at its next positions.

        Their keys are re-based (RoPE) if their positions change. `recurrent` says what happens to recurrent
        states: "refuse" or "keep".
        """

    def end(self, sequence: int) -> int:
        """Return the length of the sequence in tokens, which is its next token's position; 0 if unknown."""
        ...

    def close(self) -> None:
        """Release all memory."""


def slide(cache: Cache, sequence: int, keep: int = 0, discard: int | None = None) -> int:
    """Shift the context: drop tokens after the first `keep`, and re-base the rest.

    Args:
        cache: the cache to change.
        sequence: the sequence to shorten.
        keep: the number of first tokens that stay.
        discard: the number of tokens to drop, at most all after `keep`. None drops the older half of
            those: `(end - keep) // 2`.

    Returns:
        The number of tokens dropped.

    Raises:
        ValueError: a number is negative.
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


def checked_recurrent(recurrent: Recurrent) -> Recurrent:
    """Return the argument of `remove`. Raises ValueError if it is not one of the known values."""
    if recurrent not in get_args(Recurrent):
        known = ", ".join(f'"{value}"' for value in get_args(Recurrent))
        raise ValueError(f"recurrent must be one of {known}, got {recurrent!r}")
    return recurrent
