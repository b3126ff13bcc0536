"""What a conversation's layer holds, in mlx-lm's form.

Layers of keys and values: full attention, sliding windows and chunks.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...caches.causal import PositionalCache
from ...cells.spans import Spans, seen_from
from ...cells.visibility import Causal, Chunk, Window
from ...errors import CacheError
from ...quantization import Quantization
from ...storage.buffers import AnyPair, Cells, Lanes, cells_in, concatenated
from ...storage.codec import Plain, alias, joined
from ..forward.forward import Forward
from ..forward.rows import Rows
from ..hosts.layout import Leaf
from ..pool.conversation import Conversation
from ..rope.rebase import rebased
from .base import Layer


def stored(conversation: Conversation, leaf: Leaf) -> tuple[mx.array, mx.array]:
    """K and V (1, n_kv_heads, S, head_dim) of the newest tokens, as many as mlx-lm would keep.

    At the first token of a chunk there are none, S = 0. Keys are returned at the tokens' own positions,
    whatever the model's offset is.
    """
    pool = conversation.pool
    cells = _kept(conversation, leaf)
    if not cells:
        # After a load the store may not know the layer yet, but the model has been tried.
        form = pool.forms[leaf.index]
        assert form is not None
        return form.decoded(form.zeros(0))
    keys, values = concatenated(pool.keyed(leaf)._store.layers[leaf.index].read(cells))
    lead = conversation.head.lead
    rotation = pool.scheme.rotations[leaf.index] if lead else None
    return rebased(rotation, keys, values, -lead)


def packed(conversation: Conversation, leaf: Leaf) -> Lanes:
    """The same in the bits that the leaf is packed in."""
    buffers = conversation.pool.keyed(leaf)._store.layers[leaf.index]
    if conversation.head.lead:
        keys, values = stored(conversation, leaf)
        return buffers.form.stored((Plain(keys), Plain(values)), is_packed=True)
    pieces = [buffers.form.stored(lanes, True) for lanes in buffers.lanes(_kept(conversation, leaf))]
    return joined([keys for keys, _ in pieces]), joined([values for _, values in pieces])


def buffers_of(conversation: Conversation, leaf: Leaf) -> list[mx.array]:
    """All that is stored of what `stored` returns, as it is."""
    pieces = conversation.pool.keyed(leaf)._store.layers[leaf.index].lanes(_kept(conversation, leaf))
    return [array for piece in pieces for lane in piece for array in lane.arrays]


def _kept(conversation: Conversation, leaf: Leaf) -> list[Cells]:
    cache = conversation.pool.keyed(leaf)
    spans, position = cache._table[conversation.sequence].spans, conversation.position
    if not isinstance(leaf.rule, Chunk):
        # The newest token still sees what the next one pushes out.
        position -= 1
    return cells_in(seen_from(cache._rule, spans, position))


class KeyValueLayer(Layer):
    """K and V by position."""

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **more: Any
    ) -> Any:
        """The mask for the next N tokens, as `mlx_lm.models.base.create_attention_mask` asks for it.

        Returns:
            None, "causal", or booleans (N, S); of a batch (B, 1, N, S). In a model's call it may be a
            handle, which only attention understands.
        """
        rows, leaf = self.rows, self.leaf
        forward = rows.forward
        if not rows.is_open(leaf.index, N) or (
            forward and not rows.is_called and leaf.index in forward.asked
        ):
            rows.begin(N)
        forward = rows.forward
        assert forward is not None
        forward.asked.add(leaf.index)
        return forward.mask(leaf, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Store K and V (B, n_kv_heads, n, head_dim) and return the history, these included.

        In a model's call it may be handles, which only attention understands.

        Raises:
            ValueError: arrays of other shapes than before, or of other rows than there are.
            CacheFullError: there is no room; nothing has changed.
            CacheError: this layer has stored its tokens of this call already.
        """
        rows, leaf = self.rows, self.leaf
        forward = rows.forward
        if forward is None or forward.written[leaf.index]:
            forward = self._begun(keys)
        history = forward.update(leaf, keys, values)
        forward.written[leaf.index] = True
        rows.wrote()
        return history

    def keys_and_values(self) -> Any:
        """What `update_and_fetch` returned last."""
        forward = self.rows.forward
        if forward is not None and forward.written[self.leaf.index]:
            return forward.history(self.leaf)
        return stored(self.rows.conversation, self.leaf)

    @property
    def keys(self) -> mx.array | None:
        """The buffer that the newest keys are in; assigning one of the same shape replaces it."""
        pair = self._newest_pair()
        return alias(pair.keys) if pair else None

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._replace("keys", array)

    @property
    def values(self) -> mx.array | None:
        """The same of values."""
        pair = self._newest_pair()
        return alias(pair.values) if pair else None

    @values.setter
    def values(self, array: mx.array) -> None:
        self.rows.pool.mirrored.add(self.leaf.index)
        self._replace("values", array)

    def is_trimmable(self) -> bool:
        return True

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> KeyValueLayer:
        """Store keys and values of all layers in fewer bits, where they are in the model's precision.

        Returns:
            What takes this layer's place in the cache list.

        Raises:
            ValueError: bits that there are not, or heads that groups do not divide.
        """
        self.rows.quantize(Quantization(bits, group_size))
        return layer_of(self.rows, self.leaf)

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's held K and V, what is shared counted in full."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        if buffers is None:
            return 0
        packed, cell_bytes = self._cache._table.packed, buffers.form.cell_bytes
        spans = (span for spans in self._spans() for span in spans)
        return sum(span.length * cell_bytes(span.segment in packed) for span in spans)

    @property
    def state(self) -> Any:
        """What mlx-lm's class of this name would have; of a batch, the buffers that the rows are in.

        After removals the keys are copies, rotated to their own positions: mlx-lm's `save_prompt_cache`
        reads them here, and a file with the model's offsets would be wrong without a word.
        """
        if self.rows.is_batch:
            buffers = self._cache._store.layers.get(self.leaf.index)
            pairs = buffers.pairs if buffers else {}
            segments = {span.segment for spans in self._spans() for span in spans}
            return [alias(array) for s in segments if s in pairs for array in pairs[s].arrays]
        if self.is_packed:
            # One array more or less than any of mlx-lm's classes has, so that none takes it for its own.
            return [buffers_of(self.rows.conversation, self.leaf)]
        return self.plain_state

    @property
    def is_packed(self) -> bool:
        """Whether any of what is held is in fewer bits."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        spans = (span for spans in self._spans() for span in spans)
        packed = self._cache._table.packed
        return buffers is not None and buffers.form.is_packed and any(s.segment in packed for s in spans)

    @property
    def plain_state(self) -> Any:
        """What mlx-lm's class would have, in float."""
        if self.empty():
            return self._state(None, None)
        return self._state(*stored(self.rows.conversation, self.leaf))

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        raise NotImplementedError

    def _begun(self, keys: mx.array) -> Forward:
        """The forward that these keys belong to, where that is not plain."""
        rows = self.rows
        if rows.is_called and rows.forward and rows.forward.written[self.leaf.index]:
            raise CacheError(f"layer {self.leaf.name} is written twice in one call")
        if not rows.is_called:
            rows.begin_unasked(keys.shape[-2])
        assert rows.forward is not None
        return rows.forward

    @property
    def _cache(self) -> PositionalCache:
        return self.rows.pool.keyed(self.leaf)

    def _spans(self) -> list[Spans]:
        """Where what each row holds lies."""
        self.rows.check_open()
        return [self._cache._table[conversation.sequence].spans for conversation in self.rows.conversations]

    def _newest_pair(self) -> AnyPair | None:
        """Of the first row: models that assign to it want no more than that it is evaluated."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        spans = next((spans for spans in self._spans() if spans), None)
        return buffers.pairs.get(spans[-1].segment) if buffers and spans else None

    def _replace(self, slot: str, array: mx.array) -> None:
        pair = self._newest_pair()
        shape = getattr(pair, slot).shape if pair else None
        if array.shape != shape:
            raise ValueError(
                f"{slot} of layer {self.leaf.name} are {shape}, they cannot become {array.shape}"
            )
        setattr(pair, slot, alias(array))


class KVCache(KeyValueLayer):
    """A layer of full attention."""

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        return keys, values, self.size()


class QuantizedKVCache(KVCache):
    """A layer of full attention that is packed from its first token on, keys and values alike."""

    @property
    def state(self) -> Any:
        """As `KeyValueLayer.state`."""
        codec = self.rows.pool.codecs(self.leaf)[0]
        if self.rows.is_batch or codec is None:
            return super().state
        lanes: Any = (None, None)
        if not self.empty():
            lanes = tuple(lane.arrays for lane in packed(self.rows.conversation, self.leaf))
        return *lanes, self.size(), codec.group_size, codec.bits


class RotatingKVCache(KeyValueLayer):
    """A layer with a sliding window. `keep` first tokens stay, and `max_size` in all are seen."""

    @property
    def _window(self) -> Window:
        assert isinstance(self.leaf.rule, Window)
        return self.leaf.rule

    @property
    def keep(self) -> int:
        return self._window.sinks

    @property
    def max_size(self) -> int:
        return self._window.size + self._window.sinks

    def size(self) -> int:
        return min(super().size(), self.max_size)

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        length = 0 if keys is None else keys.shape[2]
        return keys, values, Layer.size(self), self.keep, self.max_size, length


class ChunkedKVCache(KeyValueLayer):
    """A layer of attention within chunks. Its model makes masks of its own, for one sequence only."""

    @property
    def chunk_size(self) -> int:
        assert isinstance(self.leaf.rule, Chunk)
        return self.leaf.rule.size

    @property
    def start_position(self) -> int:
        """The position of the first key that the tokens under way see."""
        position = self.rows.positions[0]
        return position - position % self.chunk_size

    def maybe_trim_front(self) -> None:
        """What chunks behind no longer need has gone already."""

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        position = self.rows.positions[0]
        start = position - (keys.shape[2] if keys is not None else 0)
        return keys, values, position, self.chunk_size, start


_CLASSES: dict[type, type[KeyValueLayer]] = {
    Causal: KVCache,
    Window: RotatingKVCache,
    Chunk: ChunkedKVCache,
}


def layer_of(rows: Rows, leaf: Leaf) -> KeyValueLayer:
    """A layer of the class that mlx-lm would have here."""
    pool = rows.pool
    keys, values = pool.codecs(leaf)
    is_packed = pool.quantization is not None and not pool.quantization.after and keys is not None
    if isinstance(leaf.rule, Causal) and is_packed and keys == values:
        return QuantizedKVCache(rows, leaf)
    return _CLASSES[type(leaf.rule)](rows, leaf)
