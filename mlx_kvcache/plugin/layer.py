"""What mlx-lm sees: one object for each of the model's layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..arrays.mask import Mask, array_mask, positions_of
from ..cells.rules import Causal, Window
from ..errors import CacheError, NotSupportedError
from .state import SequenceState


class LayerCache:
    """A layer of full attention. Has neither a length nor a truth value, as mlx-lm tests that.

    Attributes:
        offset: where the model's RoPE goes on. It counts this layer's tokens, and may run
            ahead of them after a removal.
    """

    def __init__(self, owner: SequenceState, index: int) -> None:
        self.owner = owner
        self.index = index
        self.offset = 0
        self.forward = 0
        self.asked = 0
        self.trims = 0

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **more: Any
    ) -> Mask:
        """The mask for the next N tokens, as `mlx_lm.models.base.create_attention_mask` asks for it."""
        owner = self.owner
        if not owner.is_open(N) or self.forward == owner.forward or self.asked == owner.forward:
            owner.begin(N)
        self.asked = owner.forward
        if N == 1 and window_size is None:
            return None
        if not return_array and window_size is None:
            return "causal"
        part = owner.part()
        rule = Causal() if window_size is None else Window(window_size)
        queries, keys = positions_of([(part.begin, part.end)]), positions_of(part.ranges)
        return array_mask(rule, (queries, queries * 0), (keys, keys * 0), None, 0, None)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store K and V (1, n_kv_heads, n, head_dim) and return the history, these included."""
        owner = self.owner
        n = keys.shape[2]
        if self.forward == owner.forward or not owner.is_open(n):
            self._begin_unasked(n)
        history = owner.write(self.index, keys, values)
        self.forward = owner.forward
        self.offset += n
        owner.wrote()
        return history

    @property
    def state(self) -> list[mx.array]:
        """The stored arrays, for `mx.eval`."""
        self.owner.check_open()
        cache = self.owner.pool.cache
        buffers = cache._store.layers.get(self.index)
        pairs = buffers.pairs if buffers else {}
        segments = {span.segment for span in cache._table[self.owner.sequence].spans}
        return [array for s in segments if s in pairs for array in (pairs[s].keys, pairs[s].values)]

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's held K and V."""
        buffers = self.owner.pool.cache._store.layers.get(self.index)
        return self.owner.position * buffers.form.cell_bytes if buffers else 0

    def size(self) -> int:
        return self.owner.position

    def empty(self) -> bool:
        return self.owner.position == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every layer; the first layer that is asked does it for all.

        Raises:
            CacheError: layers are told different numbers.
        """
        owner = self.owner
        if self.trims == owner.trims:
            dropped = min(n, owner.position)
            owner.rewind_to(owner.position - dropped)
            owner.trims, owner.trimmed = owner.trims + 1, dropped
        elif min(n, owner.position + owner.trimmed) != owner.trimmed:
            raise CacheError(f"layer {self.index} is trimmed by {n}, other layers by {owner.trimmed}")
        self.trims = owner.trims
        return owner.trimmed

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> LayerCache:
        raise NotSupportedError(f"K/V cannot be quantised to {bits} bits in place; make the cache so")

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        """The same layer of a fork; all layers that are copied together belong to one."""
        fork = memo.get(id(self.owner))
        if fork is None:
            fork = memo[id(self.owner)] = self.owner.fork()
            fork.serve([LayerCache(fork, index) for index in range(len(self.owner.layers))])
        layer: LayerCache = fork.layers[self.index]
        return layer

    def _begin_unasked(self, n: int) -> None:
        owner = self.owner
        if owner.interrupted:
            owner.interrupted = False
            raise CacheError(
                "another prompt cache of the same pool was used in the middle of a forward; "
                "the tokens of that forward have been taken out, so it can be run again"
            )
        if owner.unfinished:
            owner.settle()
            raise CacheError(
                "a forward was left unfinished; its tokens have been taken out, so it can be run again"
            )
        owner.begin(n)
