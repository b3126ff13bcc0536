"""A forward pass in progress: writes each layer's K and V, and returns history and masks of its queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..batch import CacheConfig
from ..cells.placement import Placed
from ..cells.spans import Sequence as Held
from ..cells.spans import Spans
from ..cells.stacks import COPIED, PATIENCE
from ..cells.table import CellTable
from ..cells.visibility import Rule
from ..errors import CacheError
from ..storage.buffers import Buffers, Form, Lanes, Pair, Store, concatenated
from ..storage.codec import Index, Plain
from ..storage.masks import Mask, array_mask, positions_of
from .part import Part, Stack, stacks_of, take

T = TypeVar("T")

_names = count(1)


class Step:
    """A forward pass: a placement bound to arrays, shared by all layers."""

    def __init__(
        self, placed: list[Placed], n: int, rule: Rule, config: CacheConfig, store: Store, table: CellTable
    ) -> None:
        self.n = n
        self.rows = {own.sequence: own.rows for own in placed}
        """The batch indices of each sequence."""
        self._levels = table.levels
        self.parts = [Part(part, n, table.levels) for part in placed]
        self.stacks = stacks_of(self.parts, table.levels, n)
        """The parts that are written and attended to together."""
        self.apart = self._apart()
        """The other parts."""
        self.whole = self._whole()
        """The stack, if all tokens are in one, in batch order; otherwise None."""
        self.rule = rule
        self._config = config
        self.store = store
        self._capacity = table.capacity
        self._packed = table.packed
        self.later: frozenset[int] = frozenset()
        """The batch indices of tokens that also see later tokens of their sequence."""
        self._found: dict[Any, Any] = {}
        self.name = next(_names)
        self._batches: dict[int, tuple[mx.array, mx.array]] = {}
        self._keeps_batch = any(part.fresh for part in self.parts)
        levels = table.levels
        written = {s: levels.get(s) for part in self.parts for s, _, _ in part.stores}
        self._segments = {level.stack if level else s: s for s, level in written.items()}.values()
        """Of the segments that are written, one for each pair of buffers."""
        self.run = self._only_run()
        """The segment, the new cells and the visible cells, if the step reads and writes one run of cells of
        one sequence, in batch order; otherwise None."""
        self.can_move = not self._keeps_batch
        """Whether `move` may be called: all that the tokens see is stored."""
        self._form: Form | None = None
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self.opened: list[int] = []
        """The layers that were put for the first time in this step."""
        self.moves = 0
        """How often the step has become the next one."""
        longest = max((part.cells[-1].length for part in self.parts if part.cells), default=0)
        self.patience = PATIENCE + longest // COPIED
        """The number of moves after which it pays to copy all rows that decode to one stack."""
        self.is_over = False
        """Whether the forward pass is over: `get` still works, `put` does not."""

    def move(self, reads: list[Spans]) -> None:
        """Becomes the next step of the same sequences: as many tokens, in the cells after those of this one.

        Most of what a step finds out depends on the segments it uses, so it stays.

        Args:
            reads: for each part the cells that its tokens see, the new ones last.
        """
        stays = True
        for part, cells in zip(self.parts, reads, strict=True):
            stays = stays and part.cells[:-1] == cells[:-1]
            part.move(cells)
        if self.run:
            self.run = self._only_run()
        elif stays:
            self.stacks = [stack.moved() for stack in self.stacks]
            self.whole = self._whole()
        else:
            self.stacks = stacks_of(self.parts, self._levels, self.n)
            self.apart, self.whole, self.run = self._apart(), self._whole(), self._only_run()
        self.name = next(_names)
        self.moves += 1
        self.opened.clear()
        if self._found or self.later:
            self.set_later(())

    def once(self, find: Callable[..., T], *args: Any) -> T:
        """Returns find(self, *args), computed once for all layers."""
        key = find, *args
        if key not in self._found:
            self._found[key] = find(self, *args)
        found: T = self._found[key]
        return found

    def set_later(self, indices: tuple[int, ...]) -> None:
        """Lets the tokens at these batch indices also see later tokens of their sequence."""
        self._found.clear()
        self.later = frozenset(indices)

    def finish(self, before: Mapping[int, Held | None]) -> None:
        """Ends the step: refuses every further `put`.

        Raises CacheError if tokens would lack keys and values in a layer: one of earlier steps was not put,
        or a new one was put for sequences that held tokens `before`.
        """
        left = sorted(layer for layer, buffers in self.store.layers.items() if buffers.written != self.name)
        if left:
            raise CacheError(
                f"layers {left} were put in earlier batches but not in this one of {self.n} tokens, so the "
                "batch is undone: later tokens would attend to unwritten cells; put all layers in every batch"
            )
        for sequence, old in before.items():
            # With windows and chunks, a sequence may hold no cells.
            if self.opened and old and old.spans:
                raise CacheError(
                    f"layers {sorted(self.opened)} were not put for the {old.end} tokens of sequence "
                    f"{sequence} but are in this batch of {self.n} tokens, so the batch is undone: it would "
                    "attend to unwritten cells; put every layer in every batch"
                )
        self.forget()
        self.is_over = True
        # The fast paths do not check `is_over`.
        self.run, self.whole, self.can_move = None, None, False

    def forget(self) -> None:
        """Drops the quantized tokens that are held in float only because tokens of this step see them."""
        if self.is_decoding:
            # The next step drops the few.
            return
        for buffers in self.store.layers.values():
            for segment in self._segments if buffers.form.recent else ():
                if segment in buffers.pairs:
                    buffers.pairs[segment].forget()

    def put(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes the batch's keys and values, or nothing if an exception interrupts."""
        if self.is_over:
            raise over(self.n)
        known = self.store.layers.get(layer)
        form = known.form if known else self.store.form_for(layer, keys, values)
        keys, values = form.checked(self.n, layer, keys, values)
        pairs: dict[int, Pair] = {}
        batch = self._batches.get(layer)
        if known and known.written == self.name:
            # This step wrote the layer before, and keeps what it wrote then if it fails now.
            pairs = known.copies()
        try:
            if known is None:
                self.opened.append(layer)
            self._write(known or self.store.open(layer, form), layer, keys, values)
        except BaseException:
            if known is None:
                self.store.layers.pop(layer, None)
                self.opened[:] = [other for other in self.opened if other != layer]
            else:
                known.pairs.update(pairs)
                if batch:
                    self._batches[layer] = batch
            raise

    def _pair(self, buffers: Buffers, segment: int) -> Pair:
        """The pair of a segment, with all cells that it has in the table."""
        pair, capacity = buffers.pairs.get(segment), self._capacity[segment]
        if pair is None or pair.capacity < capacity:
            pair = buffers.pair(segment, capacity, segment in self._packed)
        return pair

    def _write(self, buffers: Buffers, layer: int, keys: mx.array, values: mx.array) -> None:
        for stack in self.stacks:
            new = take(keys, stack.rows).swapaxes(0, 2), take(values, stack.rows).swapaxes(0, 2)
            self._pair(buffers, stack.segment).write(stack.new, *new)
        # One split for all sequences costs less than a slice for each.
        is_joint = len(self.apart) > 1 and self.n == len(self.parts)
        each = [mx.split(array, self.n, axis=2) for array in (keys, values)] if is_joint else None
        for part in self.apart:
            for segment, index, rows in part.stores:
                pair = self._pair(buffers, segment)
                if each:
                    pair.write(index, *(arrays[part.indices[0]] for arrays in each))
                elif rows is None:
                    pair.write(index, keys, values)
                else:
                    pair.write(index, take(keys, rows), take(values, rows))
        if self._keeps_batch:
            self._batches[layer] = keys, values
        buffers.written = self.name

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays of all layers that this step writes to."""
        arrays: list[mx.array] = []
        for buffers in self.store.layers.values():
            for segment in self._segments:
                if pair := buffers.pairs.get(segment):
                    arrays += pair.arrays if pair.is_packed else (pair.keys[0], pair.values[0])
        return arrays

    @property
    def is_decoding(self) -> bool:
        """Whether each sequence of the batch has one token."""
        return self.n == len(self.parts)

    def is_packed(self, part: Part) -> bool:
        """Whether a part sees cells of a packed segment."""
        return any(span.segment in self._packed for span in part.cells)

    def exchange(
        self, layer: int, keys: mx.array, values: mx.array, reads: bool = True
    ) -> tuple[mx.array, mx.array] | None:
        """Puts keys and values and, if it `reads`, returns the history of a step with one part.

        Fast if the step has a `run`.
        """
        buffers = self.store.layers.get(layer)
        if self.run is None or buffers is None:
            self.put(layer, keys, values)
            return self.history(layer, self.parts[0]) if reads else None
        segment, new, seen = self.run
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
            pair = self._pair(buffers, segment)
        # Decoding comes here for every layer and token, so the writes are inlined.
        if pair.is_packed:
            pair.write(new, keys, values)
            buffers.written = self.name
            return pair.read_newest(seen) if reads else None
        stored_keys, stored_values = pair.keys[0], pair.values[0]
        stored_keys[new], stored_values[new] = keys, values
        buffers.written = self.name
        return (stored_keys[seen], stored_values[seen]) if reads else None

    def put_rows(self, layer: int, keys: mx.array, values: mx.array) -> bool:
        """Writes tokens (n, n_kv_heads, 1, head_dim), one of each sequence.

        Decoding a batch comes here for every layer and step. Returns False, and does nothing, if there is
        more to do than to write.
        """
        buffers = self.store.layers.get(layer)
        if not self.can_move or buffers is None or buffers.written == self.name:
            return False
        n, (heads, key_dim, value_dim, key_dtype, value_dtype, *_) = self.n, buffers.form
        if (
            keys.shape != (n, heads, 1, key_dim)
            or values.shape != (n, heads, 1, value_dim)
            or keys.dtype != key_dtype
            or values.dtype != value_dtype
        ):
            return False
        for stack in self.stacks:
            own = (keys, values) if stack.rows is None else (keys[stack.rows], values[stack.rows])
            pair = self._pair(buffers, stack.segment)
            if pair.is_packed:
                pair.write(stack.new, *own)
            else:
                pair.keys[0][stack.new], pair.values[0][stack.new] = own
        if self.apart:
            # One split for all rows costs less than a slice for each.
            each_key, each_value = mx.split(keys, n), mx.split(values, n)
            for part in self.apart:
                [(segment, new, _)], [row] = part.stores, part.indices
                self._pair(buffers, segment).write(new, each_key[row], each_value[row])
        buffers.written = self.name
        return True

    def _apart(self) -> list[Part]:
        stacked = {part.sequence for stack in self.stacks for part in stack.parts}
        return [part for part in self.parts if part.sequence not in stacked]

    def _whole(self) -> Stack | None:
        stack = self.stacks[0] if self.stacks else None
        return stack if stack and len(stack.parts) == self.n and stack.rows is None else None

    def _only_run(self) -> tuple[int, Index, Index] | None:
        part = self.parts[0]
        if len(self.parts) > 1 or part.fresh or not len(part.cells) == len(part.stores) == 1:
            return None
        [(target, new, rows)], [seen] = part.stores, part.cells
        if rows is not None or target != seen.segment:
            return None
        return target, new, (*new[:2], slice(seen.start, seen.start + seen.length))

    def history(self, layer: int, part: Part) -> tuple[mx.array, mx.array]:
        """Returns K and V (1, n_kv_heads, S, head_dim) that a part's queries see, by rising position."""
        pieces = self.store.layers[layer].read_newest(part.cells)
        if part.fresh:
            pieces.append(self._fresh(layer, part))
        return concatenated(pieces)

    def _fresh(self, layer: int, part: Part) -> tuple[mx.array, mx.array]:
        """K and V of a part's new tokens from the batch, because not all of them are stored."""
        keys, values = (take(array, part.rows) for array in self._batches[layer])
        form = self.store.layers[layer].form
        if (
            form.is_packed
            and not form.recent
            and any(segment in self._packed for segment, _, _ in part.stores)
        ):
            # Quantize and decode them like stored tokens, or outputs would depend on how a prompt is split.
            return form.decoded(form.stored((Plain(keys), Plain(values)), is_packed=True))
        return keys, values

    def lanes(self, layer: int, part: Part, cells: Spans) -> list[Lanes]:
        """Returns some of a part's cells as lanes, and its new tokens if the part is `fresh`."""
        pieces = self.stored(layer, cells, newest=True)
        if part.fresh:
            keys, values = self._fresh(layer, part)
            pieces.append((Plain(keys), Plain(values)))
        return pieces

    def stored(self, layer: int, cells: Spans, newest: bool = False) -> list[Lanes]:
        """Returns cells as lanes: as they are stored if each sequence has one query, else in float.

        With `newest`, they are the newest of a sequence.
        """
        buffers = self.store.layers[layer]
        if self.is_decoding or not buffers.form.is_packed:
            return buffers.newest(cells) if newest else buffers.lanes(cells)
        read = buffers.read_newest(cells) if newest else buffers.read(cells)
        return [(Plain(keys), Plain(values)) for keys, values in read]

    def get(self, layer: int) -> tuple[mx.array, mx.array, Mask]:
        """Returns the history of the batch: keys, values and mask, padded as the config says."""
        self.written(layer)
        keys, values = concatenated([self.history(layer, part) for part in self.parts])
        padding = -keys.shape[2] % self._config.padding
        if padding:
            keys, values = (mx.pad(array, [(0, 0), (0, 0), (0, padding), (0, 0)]) for array in (keys, values))
        return keys, values, self.once(Step._mask, padding)

    def written(self, layer: int) -> Buffers:
        """Returns the buffers of a layer. Raises CacheError if it was not put in this step."""
        buffers = self.store.layers.get(layer)
        if buffers is None or buffers.written != self.name:
            raise CacheError(f"layer {layer} has had no put in this batch")
        return buffers

    def own_mask(self, part: Part) -> Mask:
        """Returns the mask of a part's queries over its history, both by rising position."""
        if not self.later.intersection(part.indices):
            if part.end - part.begin == 1:
                return None
            lowest = max(0, self.rule.lower(part.begin), self.rule.sinks)
            if self.rule.lower(part.end - 1) <= lowest:
                return "causal"
        return self._array_mask([part], part.indices, 0)

    def _mask(self, padding: int) -> Mask:
        """The mask of the batch's tokens, in batch order, over the whole history."""
        only, dtype = self.parts[0], self._config.mask_dtype
        if len(self.parts) == 1 and only.rows is None and not padding and dtype is None:
            return self.own_mask(only)
        return self._array_mask(self.parts, range(self.n), padding, dtype)

    def _array_mask(
        self, parts: list[Part], indices: Sequence[int], padding: int, dtype: mx.Dtype | None = None
    ) -> mx.array:
        positions = np.zeros(self.n, np.int32)
        owners = np.zeros(self.n, np.int32)
        for number, part in enumerate(parts):
            positions[list(part.indices)] = np.arange(part.begin, part.end)
            owners[list(part.indices)] = number
        chosen = list(indices)
        later = np.isin(chosen, list(self.later)) if self.later else None
        keys = positions_of([pair for part in parts for pair in part.ranges])
        both = None
        if len(parts) > 1:
            both = owners[chosen], np.repeat(np.arange(len(parts), dtype=np.int32), [p.size for p in parts])
        return array_mask(self.rule, positions[chosen], keys, both, later, padding, dtype)


def over(n: int) -> CacheError:
    """Returns the error of a `put` after the end of a `forward` block."""
    return CacheError(
        f"cannot put: the forward pass of {n} tokens is over; put inside its with block, or call "
        "start_forward for new tokens"
    )
