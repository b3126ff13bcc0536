"""A cache for cross-attention: the keys and values of an encoder's output, one for each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from ..attend.part import Attending, check_queries
from ..batch import Batch, CausalOptions
from ..errors import CacheError
from .base import KeyValueCache, Pass, StreamCache, StreamPlan
from .interface import History, Recurrent
from .plan import Plan


class Entry(NamedTuple):
    """An encoder's output.

    Attributes:
        position: the position of the token that it belongs to.
        layers: its keys and values, by layer.
        given: the forward pass in which it was put.
    """

    position: int
    layers: Mapping[int, tuple[mx.array, mx.array]]
    given: Pass | None = None


class Stream(NamedTuple):
    """A sequence's length and its encoder output."""

    end: int
    entry: Entry | None


class EncoderCache(StreamCache[Stream], KeyValueCache):
    """Cache for cross-attention: holds the keys and values of one encoder output for each sequence.

    Call `put` in a batch that brings a new encoder input, and `get` in any batch; both need a batch of one
    sequence. Arrays of any length and dtype are returned as they were put. The output belongs to the
    last token of `Batch.multimodal`, or to the batch's first token if there is none, and is removed with
    that token. A new output replaces the sequence's last one in all layers.
    """

    @property
    def encoder_cached(self) -> bool:
        """Whether all sequences of the batch have an encoder output; without a batch, whether any has."""
        if self._pass is None:
            return any(stream.entry for stream in self._streams.values())
        streams = (self._streams.get(sequence) for sequence in self._pass.batch.rows)
        return all(stream is not None and stream.entry is not None for stream in streams)

    @property
    def nbytes(self) -> int:
        entries = (stream.entry for stream in self._streams.values() if stream.entry)
        pairs = (array for entry in entries for pair in entry.layers.values() for array in pair)
        return sum({id(array): array.nbytes for array in pairs}.values())

    def check(self) -> None:
        for end, entry in self._streams.values():
            assert end > 0
            assert entry is None or 0 <= entry.position < end

    def _plan_forward(self, batch: Batch) -> Plan:
        batch.check_continues(self._end)
        changes: dict[int, Stream | None] = {}
        for sequence, rows in batch.rows.items():
            old = self._streams.get(sequence)
            changes[sequence] = Stream(batch.positions[rows[-1]] + 1, old.entry if old else None)
        return StreamPlan(self, changes, batch)

    def _plan_remove(
        self, sequence: int, begin: int, end: int | None, recurrent: Recurrent = "refuse"
    ) -> Plan:
        old = self._streams.get(sequence)
        stop = self._clipped(sequence, end)
        if old is None or begin >= stop:
            return StreamPlan(self, {})
        entry = old.entry
        if entry and begin <= entry.position < stop:
            entry = None
        elif entry and entry.position >= stop:
            entry = entry._replace(position=entry.position - (stop - begin))
        left = old.end - (stop - begin)
        return StreamPlan(self, {sequence: Stream(left, entry) if left else None})

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        source = self._streams.get(src)
        end = min(length, source.end) if source else 0
        if source is None or not end:
            return StreamPlan(self, {dst: None})
        entry = source.entry if source.entry and source.entry.position < end else None
        return StreamPlan(self, {dst: Stream(end, entry)})

    def _plan_graft(self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent) -> Plan:
        old, entry = self._streams.get(sequence, Stream(0, None)), self._streams[source].entry
        offset = old.end - begin
        if entry and begin <= entry.position < end:
            # The newest encoder output is the one that a sequence has.
            return StreamPlan(
                self, {sequence: Stream(end + offset, entry._replace(position=entry.position + offset))}
            )
        return StreamPlan(self, {sequence: Stream(end + offset, old.entry)})

    def _set_causal(self, options: CausalOptions) -> None:
        """Check the options only: every token sees the whole encoder output."""
        options.check(len(self._under_way().batch))

    def _can_resume(self, sequence: int, position: int) -> bool:
        return True

    def _only_sequence(self) -> tuple[Pass, int]:
        under_way = self._under_way()
        rows = under_way.batch.rows
        if len(rows) > 1:
            raise CacheError(
                f"put and get of an encoder cache need a batch of one sequence, this has {len(rows)}"
            )
        return under_way, next(iter(rows))

    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._check_unfinished()
        under_way, sequence = self._only_sequence()
        batch, _, scratch = under_way
        if scratch is not None:
            scratch[layer] = mx.zeros_like(keys), mx.zeros_like(values)
            mx.eval(scratch[layer])
            return
        end, entry = self._streams[sequence]
        # The first put of a batch begins a new output, which replaces all layers of the last one.
        known = entry.layers if entry and entry.given is under_way else {}
        position = batch.positions[batch.multimodal[-1] if batch.multimodal else batch.rows[sequence][0]]
        self._streams[sequence] = Stream(end, Entry(position, {**known, layer: (keys, values)}, under_way))

    def _get(self, layer: int) -> History:
        (_, _, scratch), sequence = self._only_sequence()
        entry = self._streams[sequence].entry if sequence in self._streams else None
        held = entry.layers if entry else {}
        if scratch is not None:
            held = {**held, **scratch}
        if layer not in held:
            raise CacheError(f"sequence {sequence} has no encoder output in layer {layer}: call put first")
        return *held[layer], None

    def _attend(self, layer: int, given: Attending) -> mx.array:
        queries, keys, values, scale, sinks = given
        is_new = keys is not None and values is not None
        if keys is None or values is None:
            keys, values, _ = self._get(layer)
        if keys.ndim != 4 or keys.shape[0] != 1 or not keys.shape[1]:
            # MLX divides by the number of heads, and a division by zero ends the process.
            raise ValueError(f"keys of layer {layer} are {keys.shape}, expected (1, n_kv_heads, S, head_dim)")
        if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"values of layer {layer} are {values.shape}, expected (1, {keys.shape[1]}, "
                f"{keys.shape[2]}, value_dim) because the keys are {keys.shape}"
            )
        check_queries(given, len(self._under_way().batch), layer, keys.shape[1], keys.shape[3])
        if is_new:
            self._put(layer, keys, values)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=sinks)
        return out.astype(queries.dtype)
