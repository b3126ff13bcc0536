"""A forward pass under way: where each layer's K and V go, and what each query sees.

Whether a forward pass has put every layer that later tokens attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..batch import CacheConfig
from ..cells.placement import Placed
from ..cells.spans import Sequence as Held
from ..cells.table import CellTable
from ..cells.visibility import Rule
from ..errors import CacheError
from ..storage.buffers import AnyPair, Buffers, Cells, Form, Lanes, Store, concatenated
from ..storage.codec import Index, Plain
from ..storage.masks import Mask, array_mask, positions_of
from .blocks import Stretch, cut
from .part import Part, take

T = TypeVar("T")

Written = tuple[dict[int, AnyPair], tuple[mx.array, mx.array] | None]
"""What one layer has stored in a step: pairs by segment, and the batch itself where it is kept."""

_names = count(1)


class Step:
    """Binds a placement to arrays. All layers share it."""

    def __init__(
        self,
        placed: list[Placed],
        n: int,
        rule: Rule,
        config: CacheConfig,
        store: Store,
        table: CellTable,
    ) -> None:
        self.n = n
        self.parts = [Part(part, n) for part in placed]
        self._rule = rule
        self._config = config
        self.store = store
        self._capacity = table.capacity
        self._packed = table.packed
        self._later: frozenset[int] = frozenset()
        self._found: dict[Any, Any] = {}
        self.name = next(_names)
        self._batches: dict[int, tuple[mx.array, mx.array] | None] = {}
        self._whole_mask: Mask = None
        self._has_mask = False
        self._stretches: dict[int, list[Stretch]] = {}
        self._keeps_batch = any(part.fresh for part in self.parts)
        self._is_joint = n > 1 and self.is_decoding
        self._plain = self._only_run()
        self._form: Form | None = None
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self.opened: list[int] = []
        """Layers that nobody has put before."""
        self.is_over = False
        """Whether only reading is left."""

    def move(self, placed: Placed) -> None:
        """Be the step of as many tokens more, where the only part goes on behind itself."""
        self.parts[0].move(placed, self.n)
        self.name = next(_names)
        self.opened.clear()
        self._later = frozenset()
        self._found.clear()
        self._has_mask = False
        self._stretches.clear()
        self._plain = self._only_run()

    def sees_whole(self, part: Part) -> bool:
        """Whether all of a part's queries see all keys that were there before them."""
        return not self._later and self._rule.lower(part.end - 1) <= part.ranges[0][0]

    def once(self, find: Callable[[Step], T]) -> T:
        """What `find` says of this step, found once for all layers."""
        if find not in self._found:
            self._found[find] = find(self)
        found: T = self._found[find]
        return found

    def set_later(self, indices: tuple[int, ...]) -> None:
        """Batch indices of tokens that also see later ones."""
        self._found.clear()
        self._has_mask = False
        self._stretches.clear()
        self._later = frozenset(indices)

    def finish(self) -> None:
        """Refuse what else is put."""
        self.is_over = True
        # The short way does not ask.
        self._plain = None

    def put(self, layer: int, keys: mx.array, values: mx.array) -> None:
        if self.is_over:
            raise over(self.n)
        known = self.store.layers.get(layer)
        form = known.form if known else self.store.form_for(layer, keys, values)
        keys, values = form.checked(self.n, layer, keys, values)
        before = self._written_before(known, layer)
        try:
            if known is None:
                self.opened.append(layer)
            self._write(known or self.store.open(layer, form), layer, keys, values)
        except BaseException:
            if known is None:
                self.store.layers.pop(layer, None)
                self.opened[:] = [other for other in self.opened if other != layer]
            elif before:
                known.pairs.update(before[0])
                self._batches[layer] = before[1]
            raise

    def _written_before(self, buffers: Buffers | None, layer: int) -> Written | None:
        """What a layer has stored by an earlier `put` of this step, which could be read."""
        if buffers is None or buffers.written != self.name:
            return None
        segments = {segment for part in self.parts for segment, _, _ in part.stores}
        return {segment: buffers.pairs[segment].copy() for segment in segments}, self._batches.get(layer)

    def _write(self, buffers: Buffers, layer: int, keys: mx.array, values: mx.array) -> None:
        # One operation that divides them all costs less than one for each sequence.
        each = [mx.split(array, self.n, axis=2) for array in (keys, values)] if self._is_joint else None
        for part in self.parts:
            for segment, index, rows in part.stores:
                pair = buffers.pair(segment, self._capacity[segment], segment in self._packed)
                if each:
                    pair.write(index, *(arrays[part.indices[0]] for arrays in each))
                else:
                    pair.write(index, take(keys, rows), take(values, rows))
        if self._keeps_batch:
            self._batches[layer] = keys, values
        buffers.written = self.name

    @property
    def arrays(self) -> list[mx.array]:
        """Every layer's buffers that this step writes to."""
        segments = {segment for part in self.parts for segment, _, _ in part.stores}
        return [
            array
            for buffers in self.store.layers.values()
            for segment in segments
            if (pair := buffers.pairs.get(segment))
            for array in pair.arrays
        ]

    @property
    def is_decoding(self) -> bool:
        """Whether each sequence has one token."""
        return self.n == len(self.parts)

    def is_packed(self, part: Part) -> bool:
        """Whether any of what a part sees lies in a packed segment."""
        return any(segment in self._packed for segment, _, _ in part.cells)

    @property
    def is_plain(self) -> bool:
        """Whether all of the step is one run of one sequence, in batch order."""
        return self._plain is not None

    def exchange(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`put`, and the history of a step's only part, with little else where that is one run."""
        buffers = self.store.layers.get(layer)
        if self._plain is None or buffers is None:
            self.put(layer, keys, values)
            return self.history(layer, self.parts[0])
        segment, new, seen = self._plain
        form = buffers.form
        if form is not self._form:
            self._shapes = (1, form.heads, self.n, form.key_dim), (1, form.heads, self.n, form.value_dim)
            self._form = form
        if (
            (keys.shape, values.shape) != self._shapes
            or keys.dtype != form.key_dtype
            or values.dtype != form.value_dtype
        ):
            keys, values = form.checked(self.n, layer, keys, values)
        pair = buffers.pairs.get(segment)
        if pair is None or pair.capacity < self._capacity[segment]:
            pair = buffers.pair(segment, self._capacity[segment], segment in self._packed)
        # Every layer of every step comes here, so that a call less shows.
        if pair.is_packed:
            pair.write(new, keys, values)
            buffers.written = self.name
            return pair.read(seen)
        stored_keys, stored_values = pair.keys, pair.values
        stored_keys[new], stored_values[new] = keys, values
        buffers.written = self.name
        return stored_keys[seen], stored_values[seen]

    def _only_run(self) -> tuple[int, Index, Index] | None:
        """Segment, new cells and seen ones, where the step is one run of one sequence."""
        part = self.parts[0]
        if len(self.parts) > 1 or part.fresh or not len(part.cells) == len(part.stores) == 1:
            return None
        [(target, new, rows)], [(segment, _, seen)] = part.stores, part.cells
        return (segment, new, seen) if rows is None and target == segment else None

    def history(self, layer: int, part: Part) -> tuple[mx.array, mx.array]:
        """K and V (1, n_kv_heads, S, head_dim) that one part's queries see, by rising position."""
        pieces = self.store.layers[layer].read(part.cells)
        if part.fresh:
            pieces.append(self._fresh(layer, part))
        return concatenated(pieces)

    def _fresh(self, layer: int, part: Part) -> tuple[mx.array, mx.array]:
        """K and V of one part's new tokens, where not all of them are stored."""
        batch = self._batches[layer]
        assert batch is not None
        keys, values = take(batch[0], part.rows), take(batch[1], part.rows)
        form = self.store.layers[layer].form
        if form.is_packed and any(segment in self._packed for segment, _, _ in part.stores):
            # As those that are stored are read, or what comes out would depend on the size of blocks.
            return form.decoded(form.stored((Plain(keys), Plain(values)), is_packed=True))
        return keys, values

    def lanes(self, layer: int, part: Part, cells: list[Cells]) -> list[Lanes]:
        """Some of a part's cells, and its new tokens where they are not stored, piece by piece."""
        pieces = self.stored(layer, cells)
        if part.fresh:
            keys, values = self._fresh(layer, part)
            pieces.append((Plain(keys), Plain(values)))
        return pieces

    def stored(self, layer: int, cells: list[Cells]) -> list[Lanes]:
        """Cells as lanes: as they are stored if few queries look at them, else in float."""
        buffers = self.store.layers[layer]
        if self.is_decoding or not buffers.form.is_packed:
            return buffers.lanes(cells)
        return [(Plain(keys), Plain(values)) for keys, values in buffers.read(cells)]

    def get(self, layer: int) -> tuple[mx.array, mx.array, Mask]:
        self.check_put(layer)
        keys, values = concatenated([self.history(layer, part) for part in self.parts])
        padding = -keys.shape[2] % self._config.padding
        if padding:
            keys, values = (mx.pad(array, [(0, 0), (0, 0), (0, padding), (0, 0)]) for array in (keys, values))
        return keys, values, self._mask(padding)

    def check_put(self, layer: int) -> None:
        buffers = self.store.layers.get(layer)
        if buffers is None or buffers.written != self.name:
            raise CacheError(f"layer {layer} has had no put in this batch")

    def stretches(self, part: Part) -> list[Stretch]:
        """One part's queries, by rising position, in stretches that see about the same keys."""
        found = self._stretches.get(part.sequence)
        if found is None:
            whole = Stretch(slice(None), slice(None), self.own_mask(part))
            is_whole = bool(self._later.intersection(part.indices))
            found = [whole] if is_whole else cut(self._rule, part, whole)
            self._stretches[part.sequence] = found
        return found

    def own_mask(self, part: Part) -> Mask:
        """Who of one part's queries, by rising position, sees which of its history."""
        if self._later and self._later.intersection(part.indices):
            return self._array_mask([part], part.indices, 0)
        if part.end - part.begin == 1:
            return None
        lowest = max(0, self._rule.lower(part.begin), self._rule.sinks)
        if self._rule.lower(part.end - 1) <= lowest:
            return "causal"
        return self._array_mask([part], part.indices, 0)

    def _mask(self, padding: int) -> Mask:
        """Who of the batch's tokens, in batch order, sees which of the whole history."""
        if not self._has_mask:
            only = self.parts[0] if len(self.parts) == 1 and self.parts[0].rows is None else None
            if only and not padding and self._config.mask_dtype is None:
                self._whole_mask = self.own_mask(only)
            else:
                self._whole_mask = self._array_mask(
                    self.parts, range(self.n), padding, self._config.mask_dtype
                )
            self._has_mask = True
        return self._whole_mask

    def _array_mask(
        self, parts: list[Part], indices: Sequence[int], padding: int, dtype: mx.Dtype | None = None
    ) -> mx.array:
        positions = np.zeros(self.n, np.int32)
        owners = np.zeros(self.n, np.int32)
        for number, part in enumerate(parts):
            positions[list(part.indices)] = np.arange(part.begin, part.end)
            owners[list(part.indices)] = number
        chosen = list(indices)
        later = np.isin(chosen, list(self._later)) if self._later else None
        keys = positions_of([pair for part in parts for pair in part.ranges])
        both = None
        if len(parts) > 1:
            both = owners[chosen], np.repeat(np.arange(len(parts), dtype=np.int32), [p.size for p in parts])
        return array_mask(self._rule, positions[chosen], keys, both, later, padding, dtype)


def check_complete(step: Step, before: Mapping[int, Held | None]) -> None:
    """Raise CacheError where tokens have no keys and values in some layer.

    Args:
        step: in which all layers have been put that will be.
        before: what was held of its sequences before it.
    """
    left = sorted(layer for layer, buffers in step.store.layers.items() if buffers.written != step.name)
    if left:
        raise CacheError(
            f"layers {left} were put in earlier batches but not in this one of {step.n} tokens, which is "
            "taken out again: later tokens would attend to cells that nobody wrote; put every layer in every "
            "batch"
        )
    for sequence, old in before.items():
        # Windows and chunks may hold nothing of what was there.
        if step.opened and old and old.spans:
            raise CacheError(
                f"layers {sorted(step.opened)} were not put for the {old.end} tokens of sequence {sequence}, "
                f"but in this batch of {step.n} tokens, which is taken out again: it would attend to cells "
                "that nobody wrote; put every layer in every batch"
            )


def over(n: int) -> CacheError:
    """What to raise where something is put after the block of a `forward`."""
    return CacheError(
        f"the forward pass of {n} tokens is over, so nothing more can be put: put inside its `with` block; "
        "for other tokens start_forward must come first"
    )
