"""A trial forward pass: allocates the worst case and discards it, so that a lack of memory shows early."""

from __future__ import annotations

import mlx.core as mx

from ..attend.part import Attending
from ..batch import Batch, CacheConfig
from ..cells.table import CellTable
from ..cells.visibility import Causal, Rule
from ..errors import CacheError
from ..storage.buffers import Store
from ..storage.codec import index_of
from ..storage.masks import Mask


class Reservation:
    """Replaces `attend.step.Step` after `start_forward(reserve=True)`."""

    def __init__(self, batch: Batch, rule: Rule, config: CacheConfig, store: Store, table: CellTable) -> None:
        self.n = len(batch)
        self._config = config
        self._store = store
        # With `Quantization.after`, many short sequences may fill the whole room in float.
        self._is_packed = not table.pack_after
        self._pairs: dict[int, tuple[mx.array, mx.array]] = {}
        self._room = max(table.room, self.n)
        self._size = self._room
        if not isinstance(rule, Causal):
            seen = (rule.size - 1 + rule.sinks) * len(batch.rows) + self.n
            self._size = min(self._room, seen)

    def put(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Allocate and evaluate the layer's whole room, and store nothing."""
        buffers = self._store.layers.get(layer)
        form = buffers.form if buffers else self._store.form_for(layer, keys, values)
        form.checked(self.n, layer, keys, values)
        lanes = form.zeros(self._room, self._is_packed)
        mx.eval([lane.arrays for lane in lanes])
        index = index_of(0, self._size)
        self._pairs[layer] = form.decoded((lanes[0].at(index), lanes[1].at(index)))

    def get(self, layer: int) -> tuple[mx.array, mx.array, Mask]:
        if layer not in self._pairs:
            raise CacheError(f"layer {layer} has had no put in this batch")
        padding = -self._size % self._config.padding
        keys, values = (mx.pad(array, [(0, 0), (0, 0), (0, padding), (0, 0)]) for array in self._pairs[layer])
        shape, dtype = (self.n, self._size + padding), self._config.mask_dtype
        return keys, values, mx.ones(shape, mx.bool_) if dtype is None else mx.zeros(shape, dtype)

    def attend(self, layer: int, given: Attending) -> mx.array:
        """Call `put` if there are keys and values, and attend to the worst case."""
        if given.keys is not None and given.values is not None:
            self.put(layer, given.keys, given.values)
        keys, values, mask = self.get(layer)
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            # MLX requires additive masks in the dtype of the result.
            mask = mask.astype(given.queries.dtype)
        out = mx.fast.scaled_dot_product_attention(
            given.queries, keys, values, scale=given.scale, mask=mask, sinks=given.sinks
        )
        return out.astype(given.queries.dtype)
