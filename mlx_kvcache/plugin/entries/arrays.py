"""Layers of a recurrence: arrays that every token changes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from ...errors import CacheError
from ..forward.forward import newest, padded_state
from .base import Layer


class ArraysCache(Layer, mlx_lm_cache.ArraysCache):  # type: ignore[misc]
    """A list of arrays, of which some may be None. Some models ask whether it is mlx-lm's class."""

    @property
    def batch_size(self) -> int:
        return len(self.rows.conversations)

    @property
    def cache(self) -> list[mx.array | None]:
        """The arrays, (B, ...) each. Those of a forward under way change as the model assigns to them."""
        forward = self.rows.forward
        if forward is not None:
            return forward.state(self.leaf)
        return padded_state(newest(self.rows.conversation, self.leaf), self.leaf.slots)

    def __getitem__(self, idx: int) -> mx.array | None:
        return self.cache[idx]

    def __setitem__(self, idx: int, value: mx.array | None) -> None:
        """Change an array. Raises CacheError outside a call of the model."""
        forward = self.rows.forward
        if forward is None:
            raise CacheError(f"layer {self.leaf.name} can change only while the model is called")
        forward.state(self.leaf)[idx] = value
        if self.rows.is_called or idx in (self.leaf.slots - 1, -1):
            forward.written[self.leaf.index] = True
            self.rows.wrote()

    @property
    def left_padding(self) -> mx.array | None:
        """Columns of padding before the next tokens of each row, or None where there are none."""
        left = self.rows.padding.left
        return mx.array(left) - self._passed if any(left) else None

    @property
    def lengths(self) -> mx.array | None:
        """How many tokens of each row are to come, where rows are padded on the right; else None."""
        lengths = self.rows.padding.lengths
        return mx.array(lengths) - self._passed if lengths is not None else None

    @property
    def _passed(self) -> int:
        forward = self.rows.forward
        return forward.n if forward is not None and self.leaf.index in forward.advanced else 0

    def advance(self, N: int) -> None:
        """The layer has read N columns."""
        if self.rows.forward is not None:
            self.rows.forward.advanced.add(self.leaf.index)

    def is_trimmable(self) -> bool:
        return False

    def empty(self) -> bool:
        return max(self.rows.positions, default=0) == 0

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's arrays, those of checkpoints included."""
        cache = self.rows.pool.recurrent(self.leaf)
        return sum(
            cache.layer_nbytes(self.leaf.index, conversation.sequence)
            for conversation in self.rows.conversations
        )

    @property
    def state(self) -> Any:
        """What mlx-lm's class of this name would have."""
        if self.rows.is_batch:
            arrays = [array for c in self.rows.conversations for array in newest(c, self.leaf)]
            return [array for array in arrays if array is not None]
        return self.cache, self.left_padding, self.lengths
