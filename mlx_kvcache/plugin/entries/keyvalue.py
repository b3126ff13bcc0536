"""The entries of attention layers: full attention, sliding windows and chunks.

`stored`, `packed` and `buffers_of` read a layer's keys and values in the form that mlx-lm saves.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...caches.causal import PositionalCache
from ...cells.spans import Spans, seen_from
from ...cells.visibility import Causal, Chunk, Window
from ...errors import CacheError
from ...quantization import Quantization
from ...storage.buffers import Lanes, Pair, concatenated
from ...storage.codec import Lane, Plain, alias, joined
from ..forward.batch_rows import Rows
from ..forward.forward import Forward
from ..hosts.layout import Leaf
from ..pool.conversation import Conversation
from ..rope.rebase import rebased
from .base import Layer


def stored(conversation: Conversation, leaf: Leaf) -> tuple[mx.array, mx.array]:
    """The keys and values (1, n_kv_heads, S, head_dim) of the newest tokens, as many as mlx-lm would keep.

    S is 0 at the first token of a chunk. Keys are rotated to the tokens' own positions, even if the model's
    offset is larger.
    """
    pool = conversation.pool
    cells = _kept(conversation, leaf)
    if not cells:
        # After a load the store may have no buffers for the layer, but the model's trial set its form.
        form = pool.forms[leaf.index]
        assert form is not None
        return form.decoded(form.zeros(0))
    keys, values = concatenated(pool.keyed(leaf)._store.layers[leaf.index].read(cells))
    lead = conversation.head.lead
    rotation = pool.scheme.rotations[leaf.index] if lead else None
    return rebased(rotation, keys, values, -lead)


def packed(conversation: Conversation, leaf: Leaf) -> Lanes:
    """Like `stored`, but quantized with the layer's widths, and without a transform, which mlx-lm lacks."""
    buffers = conversation.pool.keyed(leaf)._store.layers[leaf.index]
    form = buffers.form.untransformed()
    if conversation.head.lead:
        keys, values = stored(conversation, leaf)
        return form.stored((Plain(keys), Plain(values)), is_packed=True)
    pieces = [form.stored(lanes, True) for lanes in buffers.lanes(_kept(conversation, leaf))]
    return joined([keys for keys, _ in pieces]), joined([values for _, values in pieces])


def buffers_of(conversation: Conversation, leaf: Leaf) -> list[mx.array]:
    """The buffers, unchanged, of the tokens that `stored` returns."""
    pieces = conversation.pool.keyed(leaf)._store.layers[leaf.index].lanes(_kept(conversation, leaf))
    return [array for piece in pieces for lane in piece for array in lane.arrays]


def _kept(conversation: Conversation, leaf: Leaf) -> Spans:
    cache = conversation.pool.keyed(leaf)
    spans, position = cache._table[conversation.sequence].spans, conversation.position
    if not isinstance(leaf.rule, Chunk):
        # The newest token still sees the cell that the next token evicts.
        position -= 1
    return seen_from(cache._rule, spans, position)


class KeyValueLayer(Layer):
    """A layer of keys and values by position."""

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **more: Any
    ) -> Any:
        """The mask for the next N tokens, for `mlx_lm.models.base.create_attention_mask`.

        Outside a model's call this may begin a forward; see `forward/batch_rows.py`.

        Args:
            N: the number of columns of the model's input.
            return_array: return an array instead of "causal".
            window_size: hide all but this many of the newest tokens.

        Returns:
            None, "causal", or booleans (N, S), for a batch (B, 1, N, S). In a model's call it may be a
            handle, which only attention accepts.

        Raises:
            CacheFullError: there is no room for N tokens; an open forward is undone.
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
        """Store keys and values (B, n_kv_heads, n, head_dim).

        Returns:
            The history of keys and of values, including the new ones. In a model's call these may be handles,
            which only attention accepts.

        Raises:
            ValueError: the arrays have other shapes than before, or another number of rows.
            CacheFullError: there is no room; an open forward is undone.
            CacheError: this layer has written in this forward already, or another prompt cache of the pool
                was used in the middle of it.
        """
        rows, leaf = self.rows, self.leaf
        forward = rows.forward
        if forward is None or forward.written[leaf.index]:
            forward = self._begun(keys)
        history = forward.update(leaf, keys, values)
        forward.written[leaf.index] = True
        if not rows.is_called:
            rows.wrote()
        return history

    def keys_and_values(self) -> Any:
        """The history that `update_and_fetch` returned last."""
        forward = self.rows.forward
        if forward is not None and forward.written[self.leaf.index]:
            return forward.history(self.leaf)
        return stored(self.rows.conversation, self.leaf)

    @property
    def keys(self) -> Any:
        """The keys that are stored, in order of position; None if there are none.

        During a forward, and for a batch, this is a buffer instead, in which cells of other caches may lie: a
        model reads and assigns it only to have arrays evaluated.
        """
        return self._read(0)

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._replace("keys", array)

    @property
    def values(self) -> Any:
        """The values; see `keys`."""
        return self._read(1)

    @values.setter
    def values(self, array: mx.array) -> None:
        self.rows.pool.mirrored.add(self.leaf.index)
        self._replace("values", array)

    def is_trimmable(self) -> bool:
        return True

    def empty(self) -> bool:
        """Whether nothing is stored, as in a layer that the model never writes."""
        return super().empty() or self.leaf.index not in self.rows.pool.forms

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> KeyValueLayer:
        """Quantize the keys and values of all layers, unless they are quantized already.

        Returns:
            The entry that replaces this one in the cache list.

        Raises:
            ValueError: the bit width is not supported, or head_dim is not a multiple of `group_size`.
        """
        self.rows.quantize(Quantization(bits, group_size))
        return layer_of(self.rows, self.leaf)

    @property
    def nbytes(self) -> int:
        """The bytes of this layer's keys and values. Shared cells count in full."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        if buffers is None:
            return 0
        return sum(buffers.nbytes(spans, self._cache._table.packed) for spans in self._spans())

    @property
    def state(self) -> Any:
        """See `Layer.state`. After a write in a forward, the history: models of mlx-lm 0.31 read it here."""
        forward = self.rows.forward
        if self.rows.pool.host.keeps_numbers_apart and forward and forward.written[self.leaf.index]:
            return self.keys_and_values()
        return super().state

    @property
    def saved_state(self) -> Any:
        """See `Layer.saved_state`. For a batch, a list of the rows' buffers.

        After removals the keys are copies, rotated to the tokens' own positions. mlx-lm's `save_prompt_cache`
        reads them here, and a file of keys at the model's offsets would be wrong without an error.
        """
        if self.rows.is_batch:
            buffers = self._cache._store.layers.get(self.leaf.index)
            pairs = buffers.pairs if buffers else {}
            segments = {span.segment for spans in self._spans() for span in spans}
            # The segments of a stack have one pair.
            each = {id(pairs[s]): pairs[s] for s in segments if s in pairs}
            return [alias(array) for pair in each.values() for array in pair.arrays]
        if self.is_packed:
            # None of mlx-lm's classes has a state of this length, so none can load it by mistake.
            return [buffers_of(self.rows.conversation, self.leaf)]
        return self.plain_state

    @property
    def is_packed(self) -> bool:
        """Whether any of the held keys or values are quantized."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        spans = (span for spans in self._spans() for span in spans)
        packed = self._cache._table.packed
        return buffers is not None and buffers.form.is_packed and any(s.segment in packed for s in spans)

    @property
    def plain_state(self) -> Any:
        """The state in the form of mlx-lm 0.32's class, not quantized."""
        if self.empty():
            return self._state(None, None)
        return self._state(*stored(self.rows.conversation, self.leaf))

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        raise NotImplementedError

    def _begun(self, keys: mx.array) -> Forward:
        """The forward that these keys begin. Raises CacheError if this layer has written already."""
        rows = self.rows
        if rows.is_called and rows.forward and rows.forward.written[self.leaf.index]:
            raise CacheError(
                f"layer {self.leaf.name} is written twice in one call: call update_and_fetch once"
            )
        if not rows.is_called:
            rows.begin_unasked(keys.shape[-2])
        assert rows.forward is not None
        return rows.forward

    @property
    def _cache(self) -> PositionalCache:
        return self.rows.pool.keyed(self.leaf)

    def _spans(self) -> list[Spans]:
        """The spans of each row."""
        self.rows.check_open()
        return [self._cache._table[conversation.sequence].spans for conversation in self.rows.conversations]

    def _read(self, slot: int) -> Any:
        """Keys (slot 0) or values (1); see `keys`."""
        rows = self.rows
        if rows.forward is None and not rows.is_batch:
            if not self.nbytes:
                return None
            state = self.saved_state if isinstance(self, QuantizedKVCache) else self.plain_state
            return state[slot]
        pair = self._newest_pair()
        return alias((pair.keys, pair.values)[slot].arrays[0]) if pair else None

    def _newest_pair(self) -> Pair | None:
        """The newest buffers of the first row."""
        buffers = self._cache._store.layers.get(self.leaf.index)
        spans = next((spans for spans in self._spans() if spans), None)
        return buffers.pairs.get(spans[-1].segment) if buffers and spans else None

    def _replace(self, slot: str, array: mx.array) -> None:
        """Replace a buffer by an array of the same shape and content, as models do in a forward.

        Raises:
            CacheError: no forward is under way.
            ValueError: the array has another shape.
        """
        if self.rows.forward is None:
            raise CacheError(
                f"cannot assign {slot} of layer {self.leaf.name}: other caches may share its cells; use "
                "update_and_fetch, trim, or make_prompt_cache for a new cache"
            )
        pair = self._newest_pair()
        lane: Lane | None = getattr(pair, slot, None)
        shape = lane.arrays[0].shape if lane else None
        if lane is None or array.shape != shape:
            raise ValueError(
                f"{slot} of layer {self.leaf.name} have shape {shape}, cannot assign shape {array.shape}"
            )
        setattr(pair, slot, lane.like((alias(array), *lane.arrays[1:])))


class KVCache(KeyValueLayer):
    """A layer of full attention."""

    def _state(self, keys: mx.array | None, values: mx.array | None) -> Any:
        return keys, values, self.size()


class QuantizedKVCache(KVCache):
    """A layer of full attention whose keys and values have one bit width from the first token on."""

    @property
    def saved_state(self) -> Any:
        """See `KeyValueLayer.saved_state`."""
        codec = self.rows.pool.codecs(self.leaf)[0]
        if self.rows.is_batch or codec is None:
            return super().saved_state
        lanes: Any = (None, None)
        if not self.empty():
            lanes = tuple(lane.arrays for lane in packed(self.rows.conversation, self.leaf))
        return *lanes, self.size(), codec.group_size, codec.bits


class RotatingKVCache(KeyValueLayer):
    """A layer with a sliding window of `max_size` tokens, including `keep` attention sinks."""

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
    """A layer of chunked attention. Its model makes its own masks, for one sequence only."""

    @property
    def chunk_size(self) -> int:
        assert isinstance(self.leaf.rule, Chunk)
        return self.leaf.rule.size

    @property
    def start_position(self) -> int:
        """The position of the first key of the current chunk."""
        position = self.rows.positions[0]
        return position - position % self.chunk_size

    def maybe_trim_front(self) -> None:
        """Does nothing: earlier chunks have been evicted already."""

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
    """Make the entry of an attention layer, of the class that the host would use."""
    pool = rows.pool
    keys, values = pool.codecs(leaf)
    is_packed = pool.quantization is not None and not pool.quantization.after and keys is not None
    if isinstance(leaf.rule, Causal) and is_packed and keys == values:
        return pool.host.entry(QuantizedKVCache)(rows, leaf)
    return pool.host.entry(_CLASSES[type(leaf.rule)])(rows, leaf)
