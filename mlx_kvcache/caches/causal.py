"""Caches for causal, sliding-window and chunked attention.

They differ in their visibility rule only. `PositionalCache` does the rest: it keeps the keys and values of
the tokens that the rule lets later tokens see, in the cells of a `CellTable` and the arrays of a `Store`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import mlx.core as mx

from ..arguments import whole
from ..attend.part import Attending, check_queries
from ..attend.sdpa import attend
from ..attend.step import Step
from ..batch import Batch, CacheConfig, CausalOptions
from ..cells.edits import drop_tail, graft, remove_range
from ..cells.placement import Placement, allocated_after, append, compact, place
from ..cells.spans import FOREVER, Sequence, clip, resumable
from ..cells.table import CellTable
from ..cells.visibility import Causal, Chunk, Rule, Window
from ..errors import CacheError, NotSupportedError
from ..quantization import Quantization
from ..storage.buffers import Form, Rebase, Staged, Store, arrays_in
from ..storage.codec import index_of
from ..storage.masks import Mask
from .base import KeyValueCache
from .interface import History, Recurrent
from .plan import Plan
from .snapshot import Snapshot, restore, snapshot_of


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


NO_HOOK = "need re-basing, and this cache has no shift hook; give it shift=rope_shift(...)"

Shift = Callable[[int, mx.array, mx.array], mx.array]
"""(layer, keys (1, n_kv_heads, m, head_dim), offsets (m,) int32) -> keys at positions + offsets."""


class PositionalCache(KeyValueCache):
    """Holds the keys and values of the tokens that a visibility rule lets later tokens see.

    Args:
        rule: the visibility rule, see `cells/visibility.py`.
        rewind: the number of newest tokens that can always be removed.
        shift: re-bases keys for `remove` with an `end`. With None, a `remove` that needs it raises.
    """

    def __init__(self, rule: Rule, rewind: int, shift: Shift | None) -> None:
        super().__init__()
        self._rule = rule
        self._rewind = rewind
        self._shift = shift
        self._table = CellTable(0)
        self._store = Store(None)
        self._step: Step | Reservation | None = None
        self.compute: Callable[[list[mx.array]], None] = mx.eval
        """Evaluates arrays that no caller knows of."""

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers, unused cells included."""
        return self._store.nbytes

    def check(self) -> None:
        self._table.check()
        for layer, buffers in self._store.layers.items():
            assert set(buffers.pairs) <= set(self._table.capacity), layer
            for segment, pair in buffers.pairs.items():
                is_packed = segment in self._table.packed and buffers.form.is_packed
                assert pair.is_packed == is_packed, (layer, segment)

    def _open(self, dtype: mx.Dtype | None, room: int, quantization: Quantization | None) -> None:
        self._table = CellTable(room, quantization.after if quantization else FOREVER)
        self._store = Store(dtype, quantization, self._table.levels)

    def _close(self) -> None:
        self._open(None, 0, None)
        self._step = None

    def _plan_forward(self, batch: Batch) -> StepPlan:
        batch.check_continues(self._end)
        step = self._step
        is_settled = isinstance(step, Step) and step.rows == batch.rows and step.moves >= step.patience
        placement = place(self._table, batch.rows, self._rule, self._rewind, is_settled)
        if placement.capacity and allocated_after(self._table, placement) <= self._table.room:
            # Nothing refers to the new cells yet, so running out of memory here changes nothing.
            self._store.grow(placement.capacity)
        return StepPlan(self, batch, placement, is_settled)

    def _plan_reserve(self, batch: Batch) -> Plan:
        return ReservePlan(self, batch)

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        source = self._table[src]
        end = min(length, source.end)
        new = Sequence(end, clip(source.spans, 0, end)) if end else None
        return CellsPlan(self, Placement(changes={dst: new}))

    def _plan_remove(
        self, sequence: int, begin: int, end: int | None, recurrent: Recurrent = "refuse"
    ) -> Plan:
        stop = self._clipped(sequence, end)
        if begin >= stop:
            return CellsPlan(self, Placement())
        if end is None:
            return CellsPlan(self, drop_tail(self._table, sequence, begin))
        removal = remove_range(self._table, sequence, begin, stop, self._rule)
        if removal.moves and self._shift is None:
            raise NotSupportedError(
                f"cannot remove [{begin}, {stop}) from sequence {sequence} of length {self._end(sequence)}: "
                f"the keys of later tokens {NO_HOOK}"
            )
        return self._plan_edit(removal, partial(self._rebase, begin - stop))

    def _plan_graft(self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent) -> Plan:
        offset = self._end(sequence) - begin
        joined = graft(self._table, source, begin, end, sequence, self._rule, offset)
        if joined.moves and self._shift is None:
            raise NotSupportedError(
                f"cannot append [{begin}, {end}) of sequence {source} to sequence {sequence} of length "
                f"{self._end(sequence)}: their keys {NO_HOOK}"
            )
        return self._plan_edit(joined, partial(self._rebase, offset))

    def _plan_edit(self, edit: Placement, rebase: Rebase) -> Plan:
        """Plan an edit, with lazy arrays for the tokens to re-base."""
        return CellsPlan(self, edit, self._store.stage(edit, rebase))

    def _rebase(self, offset: int, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        assert self._shift is not None
        moved = self._shift(layer, keys, mx.full((keys.shape[2],), offset, mx.int32))
        if moved.shape != keys.shape:
            raise ValueError(
                f"the shift hook returned keys of shape {moved.shape} in layer {layer}, expected {keys.shape}"
            )
        return moved.astype(keys.dtype), values

    def _snapshot(self, sequence: int) -> Snapshot:
        return snapshot_of(self._table, self._store, sequence)

    def _plan_restore(self, sequence: int, snapshot: Snapshot) -> Plan:
        return CellsPlan(self, *restore(self._table, self._store, sequence, snapshot))

    def _set_causal(self, options: CausalOptions) -> None:
        step = self._current()
        options.check(step.n)
        if isinstance(step, Step):
            step.set_later(options.except_)

    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._current().put(layer, keys, values)

    def _get(self, layer: int) -> History:
        return self._current().get(layer)

    def _attend(self, layer: int, given: Attending) -> mx.array:
        step = self._current()
        # Checked before anything is stored, so that an error leaves the cache unchanged.
        buffers = self._store.layers.get(layer)
        form = buffers.form if buffers else self._coming_form(layer, given)
        check_queries(given, step.n, layer, form.heads, form.key_dim)
        return attend(step, layer, given) if isinstance(step, Step) else step.attend(layer, given)

    def _coming_form(self, layer: int, given: Attending) -> Form:
        """The form of a layer that stores nothing yet."""
        keys, values = given.keys, given.values
        if keys is None or values is None:
            keys, values, _ = self._get(layer)
        return self._store.form_for(layer, keys, values)

    def _can_resume(self, sequence: int, position: int) -> bool:
        end, spans = self._table[sequence]
        return position <= end and resumable(self._rule, spans, position)

    def _end(self, sequence: int) -> int:
        return self._table[sequence].end

    def _current(self) -> Step | Reservation:
        if self._step is None:
            raise self._no_batch()
        return self._step

    def _sweep(self, but: Container[int] = ()) -> None:
        """Free the segments that no sequence owns, except those in `but`."""
        orphans = [segment for segment in self._table.orphans if segment not in but]
        if orphans:
            self._store.drop(orphans)
            self._table.forget(orphans)
        if self._table.levels and self._step is None and (thin := self._table.thin()):
            placement = compact(self._table, thin)
            plan = CellsPlan(self, placement, self._store.stage(placement))
            # The stack is freed when the copies are computed.
            with suppress(RuntimeError):
                self.compute(list(plan.arrays()))
            plan.commit()


class Journal:
    """Notes what a change of a `PositionalCache` replaces, so that it can be rolled back.

    Its size is proportional to the change, not to the cache.
    """

    def __init__(self, cache: PositionalCache) -> None:
        self._cache = cache
        self._step = cache._step
        self._noted: list[tuple[dict[int, Any], int, Any]] = []

    def open(self, forms: Mapping[int, Form]) -> None:
        """Open the layers that are not open."""
        store = self._cache._store
        new = {layer: form for layer, form in forms.items() if layer not in store.layers}
        self._note(store.layers, new)
        for layer, form in new.items():
            store.open(layer, form)

    def apply(self, placement: Placement, staged: Staged | None = None) -> None:
        """Make a planned placement: first the arrays, then the owners of cells.

        Segments without an owner stay until they are swept, because a rollback may need them.
        """
        table, store = self._cache._table, self._cache._store
        staged = store.stage(placement) if staged is None else staged
        self._note(table.sequences, placement.changes)
        self._note(table.capacity, placement.capacity)
        self._note(table.levels, placement.levels)
        for layer, pairs in staged.items():
            self._note(store.layers[layer].pairs, pairs)
        table.capacity.update(placement.capacity)
        table.packed.update(placement.packed)
        table.levels.update(placement.levels)
        store.adopt(staged)
        table.assign(placement.changes)

    def _note(self, entries: dict[int, Any], keys: Iterable[int]) -> None:
        self._noted += [(entries, key, entries.get(key)) for key in keys]

    def roll_back(self) -> None:
        """Restore everything that was noted."""
        for entries, key, old in reversed(self._noted):
            entries.pop(key, None)
            if old is not None:
                entries[key] = old
        self._cache._table.recount()
        self._cache._step = self._step


class CellsPlan(Plan):
    """Changes the sequences of a `PositionalCache`; `get` of the last forward pass stops working.

    `staged` are the new arrays, and `forms` those of the layers that a restored sequence needs.
    """

    def __init__(
        self,
        cache: PositionalCache,
        placement: Placement,
        staged: Staged | None = None,
        forms: Mapping[int, Form] | None = None,
    ) -> None:
        self._cache = cache
        self._placement = placement
        self._staged = staged or {}
        self._forms = forms or {}
        self._journal: Journal | None = None

    def make(self) -> None:
        if not self._placement.changes:
            return
        cache, table = self._cache, self._cache._table
        self._journal = journal = Journal(cache)
        cache._step = None
        journal.open(self._forms)
        # A removal may write to segments that are there, which must not move then.
        if self._forms and allocated_after(table, self._placement) > table.room:
            journal.apply(compact(table))
        journal.apply(self._placement, self._staged)

    def unmake(self) -> None:
        if self._journal:
            self._journal.roll_back()

    def arrays(self) -> Iterable[mx.array]:
        return arrays_in(self._staged)

    def settle(self) -> None:
        self._cache._sweep()


class StepPlan(CellsPlan):
    """Adds the tokens of a batch to their sequences."""

    def __init__(self, cache: PositionalCache, batch: Batch, placement: Placement, is_settled: bool) -> None:
        super().__init__(cache, placement)
        self._batch = batch
        self._is_settled = is_settled
        self._undo = placement.undo
        self._step: Step | None = None
        self.made = 0

    def make(self) -> None:
        cache, table = self._cache, self._cache._table
        self._journal = journal = Journal(cache)
        if self._placement.capacity and allocated_after(table, self._placement) > table.room:
            journal.apply(compact(table))
            self._placement = place(table, self._batch.rows, cache._rule, cache._rewind, self._is_settled)
            self._undo = self._placement.undo
        journal.apply(self._placement)
        placed, n = self._placement.placed, len(self._batch)
        cache._step = self._step = Step(placed, n, cache._rule, cache._config, cache._store, table)

    def settle(self) -> None:
        self._journal = None
        if self._cache._table.orphans:
            self._cache._sweep(but=self._placement.in_use())

    @property
    def is_under_way(self) -> bool:
        step = self._step
        return step is not None and self._cache._step is step and not step.is_over

    def finish(self) -> None:
        if self._step is not None and self.is_under_way:
            self._step.finish(self._undo)

    def undo(self) -> None:
        step, cache = self._step, self._cache
        if step is not None and cache._step is step:
            cache._table.assign(self._undo)
            for layer in step.opened:
                cache._store.layers.pop(layer, None)
            if not cache._table.sequences:
                # An empty cache accepts keys and values of any shape and dtype.
                cache._store.layers.clear()
            cache._step = None

    def again(self) -> bool:
        cache, step = self._cache, self._step
        # Every other change of the cache replaces `_step`.
        if step is None or cache._step is not step or not step.can_move:
            return False
        # After a row has begun a segment, rows may be stacked that could not be before.
        if not self.made and self._placement.capacity and not (step.run or step.stacks):
            return False
        is_divided = len(step.stacks) + len(step.apart) > 1
        if is_divided and step.moves >= step.patience and not self._is_settled:
            return False
        appended = append(cache._table, step.rows, cache._rule, cache._rewind)
        if appended is None:
            return False
        try:
            # The last tokens were in the last cells of their segments, so nobody has those after them.
            cache._table.assign(appended.changes, is_growth=True)
            step.move(appended.reads)
            self._undo = appended.undo
            self.made += 1
        except BaseException:
            cache._table.assign(appended.undo)
            # The step may be half moved, so it cannot be used any more.
            cache._step = None
            raise
        return True


class ReservePlan(CellsPlan):
    """Begins a trial of the worst case, which adds no tokens."""

    def __init__(self, cache: PositionalCache, batch: Batch) -> None:
        super().__init__(cache, Placement())
        self._reservation = Reservation(batch, cache._rule, cache._config, cache._store, cache._table)

    def make(self) -> None:
        self._journal = Journal(self._cache)
        self._cache._step = self._reservation

    def undo(self) -> None:
        if self._cache._step is self._reservation:
            self._cache._step = None


class CausalCache(PositionalCache):
    """Cache for full causal attention: a token sees itself and all tokens before it in its sequence.

    Args:
        shift: re-bases keys, so that a range in the middle of a sequence can be removed; see `rope_shift`.
    """

    def __init__(self, shift: Shift | None = None) -> None:
        super().__init__(Causal(), rewind=0, shift=shift)


class SlidingWindowCache(PositionalCache):
    """Cache for sliding-window attention, with or without attention sinks.

    A token sees itself, the `window_size` - 1 tokens before it, and the first `sinks` of its sequence. After
    each batch, of any size, the cache holds the newest `window_size` + `rewind` - 1 tokens of a sequence
    and its sinks.

    Args:
        window_size: the number of tokens that a token sees, itself included, as in mlx-lm and transformers.
        rewind: the number of newest tokens that can always be removed.
        sinks: the number of first tokens of each sequence that stay visible.
        shift: as in `CausalCache`.

    Raises:
        ValueError: `window_size` is below 1, `rewind` or `sinks` is negative, or `sinks` >= `window_size`.
    """

    def __init__(self, window_size: int, rewind: int = 1, sinks: int = 0, shift: Shift | None = None) -> None:
        (window_size,) = whole(1, window_size=window_size)
        rewind, sinks = whole(rewind=rewind, sinks=sinks)
        if sinks >= window_size:
            raise ValueError(
                f"sinks must be 0 to {window_size - 1} in a window of {window_size} tokens, got {sinks}"
            )
        super().__init__(Window(window_size, sinks), rewind, shift)


class ChunkedAttentionCache(PositionalCache):
    """Cache for chunked attention: a token at position p sees positions p - p % chunk_size to p.

    The first chunk begins at position 0. Memory of a past chunk is freed once no rewind can reach it.

    Args:
        chunk_size: the number of tokens in a chunk.
        rewind: the number of newest tokens that can always be removed.
        shift: as in `CausalCache`.

    Raises:
        ValueError: `chunk_size` is below 1, or `rewind` is negative.
    """

    def __init__(self, chunk_size: int, rewind: int = 1, shift: Shift | None = None) -> None:
        (chunk_size,) = whole(1, chunk_size=chunk_size)
        (rewind,) = whole(rewind=rewind)
        super().__init__(Chunk(chunk_size), rewind, shift)
