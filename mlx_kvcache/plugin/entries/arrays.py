"""The entry of a recurrent layer: a list of arrays that every token changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import CacheError
from ..forward.forward import newest, padded_state
from ..hosts.mixers import Place
from ..hosts.observe import Call
from .base import Layer


class ArraysCache(Layer):
    """A list of arrays or None."""

    @property
    def batch_size(self) -> int:
        return len(self.rows.conversations)

    @property
    def cache(self) -> list[mx.array | None]:
        """The arrays (B, ...). During a forward, those that the model has assigned so far."""
        forward = self.rows.forward
        if forward is not None:
            return forward.state(self.leaf)
        return padded_state(newest(self.rows.conversation, self.leaf), self.leaf.slots)

    def __getitem__(self, idx: int) -> mx.array | None:
        return self.cache[idx]

    def __setitem__(self, idx: int, value: mx.array | None) -> None:
        """Replace an array. Raises CacheError unless a forward is under way."""
        forward = self.rows.forward
        if forward is None:
            raise CacheError(
                f"layer {self.leaf.name} can change only while the model is called: no forward is under way"
            )
        forward.state(self.leaf)[idx] = value
        if self.rows.is_called or idx in (self.leaf.slots - 1, -1):
            forward.written[self.leaf.index] = True
            self.rows.wrote()

    def recurrent_places(self) -> Sequence[Place]:
        return (Place(self.leaf.index, self.leaf.slots),)

    def called_by(
        self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        forward = self.rows.forward
        if forward is None or not self.rows.is_called:
            return call(*args, **kwargs)
        return forward.run_mixer(self.leaf, module, call, args, kwargs)

    @property
    def left_padding(self) -> mx.array | None:
        """The number of padding columns before the next tokens of each row (B,), or None without padding."""
        left = self.rows.padding.left
        return mx.array(left) - self._passed if any(left) else None

    @property
    def lengths(self) -> mx.array | None:
        """The number of tokens of each row (B,) still to come, or None without padding on the right."""
        lengths = self.rows.padding.lengths
        return mx.array(lengths) - self._passed if lengths is not None else None

    @property
    def _passed(self) -> int:
        forward = self.rows.forward
        return forward.n if forward is not None and self.leaf.index in forward.advanced else 0

    metadata_revision = 0
    history_capacity = 0
    """For mlx-vlm: nothing is recorded for speculation, because `trim` can go back without it."""
    is_speculating = False

    def update_window(
        self, index: int, source: mx.array, width: int, *, lengths: mx.array | None = None
    ) -> mx.array:
        """Store the newest `width` columns of `source` (B, S, ...) as an array, as mlx-vlm's class does.

        Args:
            lengths: for each row, the number of columns after the first `width` that are tokens.
        """
        length = source.shape[1] - width
        if lengths is None:
            state = mx.contiguous(source[:, length:])
        else:
            columns = mx.clip(lengths, 0, length)[:, None] + mx.arange(width)
            columns = columns.reshape(*columns.shape, *([1] * (source.ndim - 2)))
            state = mx.take_along_axis(source, columns, axis=1)
        self[index] = state
        return state

    def update_recurrent(self, index: int, length: int, update: Any) -> tuple[mx.array, mx.array]:
        """Replace an array by that of `update(array, None)`, which returns (output, array); for mlx-vlm."""
        output, state, *_ = update(self[index], None)
        self[index] = state
        return output, state

    def make_mask(self, N: int) -> mx.array | None:
        """The columns (B, N) of the next input that are tokens; None without padding."""
        columns, left, lengths = mx.arange(N), self.left_padding, self.lengths
        mask = None if left is None else columns >= left[:, None]
        if lengths is None:
            return mask
        ends = columns < lengths[:, None]
        return ends if mask is None else mask & ends

    def advance(self, N: int) -> None:
        """Note that the layer has read all columns of the forward. N is ignored."""
        if self.rows.forward is not None:
            self.rows.forward.advanced.add(self.leaf.index)

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be dropped one by one."""
        return bool(self.rows.pool.mixers)

    def empty(self) -> bool:
        return max(self.rows.positions, default=0) == 0

    @property
    def nbytes(self) -> int:
        """The bytes of this layer's arrays, including checkpoints."""
        return sum(
            self.rows.pool.recurrent.layer_nbytes(self.leaf.index, conversation.sequence)
            for conversation in self.rows.conversations
        )

    @property
    def saved_state(self) -> Any:
        """See `Layer.saved_state`."""
        if self.rows.is_batch:
            arrays = [array for c in self.rows.conversations for array in newest(c, self.leaf)]
            return [array for array in arrays if array is not None]
        return self.cache, self.left_padding, self.lengths
