"""Buffers of keys and values: one pair of arrays for each layer and segment.

A `Form` holds the shapes, dtypes and codecs of a layer, a `Pair` the keys and values of one segment,
`Buffers` all pairs of a layer, and `Store` all layers. Moves are staged: they prepare new pairs of lazy
arrays, which `Store.adopt` then puts in place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from ..cells.placement import Placement
from ..cells.spans import Span, Spans
from ..cells.table import Level
from ..quantization import Codec, Codecs, Quantization
from .codec import Index, Lane, Packed, Plain, alias, as_stored, cell_bytes, grown, index_of, joined, zeros

Lanes = tuple[Lane, Lane]
"""Keys and values of the same cells."""


class Form(NamedTuple):
    """The shapes, dtypes and codecs of a layer, which its first `put` sets.

    Keys and values are written and read in the dtypes. Packed segments store them with the codecs.
    """

    heads: int
    key_dim: int
    value_dim: int
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    key_codec: Codec | None = None
    value_codec: Codec | None = None
    recent: int = 0
    """How many of the newest tokens packed segments hold in float, too."""

    @property
    def is_packed(self) -> bool:
        """Whether packed segments of this layer are quantized."""
        return self.key_codec is not None or self.value_codec is not None

    def packed_by(self, codecs: Codecs, name: str, recent: int = 0) -> Form:
        """Returns the form with these codecs. Raises ValueError if they do not fit the layer of this name."""
        keys, values = codecs
        if self.heads == 1 and self.key_dim != self.value_dim:
            # One latent for all heads, which a transform does not improve.
            keys, values = keys and keys.plain(), values and values.plain()
        for what, dim, codec in (("keys", self.key_dim, keys), ("values", self.value_dim, values)):
            if codec:
                codec.check(self.heads, dim, f"the {what} of {name}")
        # Layers with keys only have no values to quantize.
        values = values if self.value_dim else None
        return self._replace(key_codec=keys, value_codec=values, recent=recent if keys or values else 0)

    def untransformed(self) -> Form:
        """Returns the form whose codecs have no transform."""
        keys, values = self.key_codec, self.value_codec
        return self._replace(key_codec=keys and keys.plain(), value_codec=values and values.plain())

    def plain(self) -> Form:
        """Returns the form of segments that are not packed."""
        return self._replace(key_codec=None, value_codec=None, recent=0)

    def checked(self, n: int, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Converts K and V of n tokens to this form's dtypes. Raises ValueError if they do not fit it."""
        key_shape, value_shape = (1, self.heads, n, self.key_dim), (1, self.heads, n, self.value_dim)
        if keys.shape != key_shape or values.shape != value_shape:
            raise ValueError(
                f"keys and values of layer {layer} are {keys.shape} and {values.shape}, "
                f"expected {key_shape} and {value_shape}"
            )
        as_stored = keys.dtype == self.key_dtype and values.dtype == self.value_dtype
        if not as_stored or not mx.issubdtype(self.key_dtype, mx.floating):
            for name, array in (("keys", keys), ("values", values)):
                if not mx.issubdtype(array.dtype, mx.floating):
                    raise ValueError(f"{name} of layer {layer} are {array.dtype}, expected floats")
            keys, values = keys.astype(self.key_dtype), values.astype(self.value_dtype)
        return keys, values

    def cell_bytes(self, is_packed: bool) -> int:
        return self.heads * sum(cell_bytes(*side) for side in self._sides(is_packed))

    def zeros(self, cells: int, is_packed: bool = False, levels: int = 1) -> Lanes:
        keys, values = (zeros(self.heads, cells, *side, levels) for side in self._sides(is_packed))
        return keys, values

    def stored(self, lanes: Lanes, is_packed: bool) -> Lanes:
        """Converts lanes to those of a packed segment, or of one that is not packed."""
        (_, key_dtype, key_codec), (_, value_dtype, value_codec) = self._sides(is_packed)
        keys, values = lanes
        return as_stored(keys, key_codec, key_dtype), as_stored(values, value_codec, value_dtype)

    def decoded(self, lanes: Lanes) -> tuple[mx.array, mx.array]:
        """Converts lanes to float arrays."""
        return lanes[0].decoded(self.key_dtype), lanes[1].decoded(self.value_dtype)

    def pair(self, parts: Sequence[Lanes], capacity: int, is_packed: bool) -> Pair:
        """Returns a new pair of these K and V, concatenated, and zeros up to at least `capacity` cells.

        A packed pair keeps the last ones in float, too, as far as they come in float.
        """
        stored = [self.stored(lanes, is_packed) for lanes in parts]
        size = sum(keys.arrays[0].shape[2] for keys, _ in stored)
        if size < capacity:
            stored.append(self.zeros(capacity - size, is_packed))
        keys, values = zip(*stored, strict=True)
        return Pair(self, joined(keys), joined(values), self.recent_of(parts, size) if is_packed else NONE)

    def recent_of(self, parts: Sequence[Lanes], end: int) -> Recent:
        """Returns the last of these cells, as far as they are in float; `end` is the cell after them."""
        found = Recent(end)
        for keys, values in reversed(parts):
            if not (isinstance(keys, Plain) and isinstance(values, Plain)) or found.length >= self.recent:
                break
            own = Recent(end - found.length, self.decoded((keys, values)))
            found = own.then(*found.floats) if found.floats else own
        return found.newest(self.recent)

    def _sides(self, is_packed: bool) -> tuple[Side, Side]:
        form = self if is_packed else self.plain()
        return (
            (form.key_dim, form.key_dtype, form.key_codec),
            (form.value_dim, form.value_dtype, form.value_codec),
        )


Side = tuple[int, mx.Dtype, Codec | None]
"""The features, dtype and codec of keys or of values."""


class Recent(NamedTuple):
    """The cells before `end` of a packed segment in float, (levels, heads, length, dim).

    The same cells are quantized, too, so whoever shares, copies or saves cells may leave these out. The
    arrays are never changed in place.
    """

    end: int = 0
    floats: tuple[mx.array, mx.array] | None = None

    @property
    def length(self) -> int:
        return self.floats[0].shape[2] if self.floats else 0

    @property
    def begin(self) -> int:
        return self.end - self.length

    def at(self, begin: int, end: int) -> tuple[mx.array, mx.array]:
        """Returns views of the cells [begin, end)."""
        assert self.floats is not None
        keys, values = self.floats
        first = self.end - keys.shape[2]
        own = slice(begin - first, end - first)
        return keys[:, :, own], values[:, :, own]

    def newest(self, size: int, end: int | None = None) -> Recent:
        """Returns the newest `size` cells of those before `end`."""
        end = self.end if end is None else end
        begin = max(self.begin, end - size)
        if (begin, end) == (self.begin, self.end):
            return self
        return Recent(end, self.at(begin, end) if begin < end else None)

    def then(self, keys: mx.array, values: mx.array) -> Recent:
        """Returns these cells followed by others."""
        floats = concatenated([self.floats, (keys, values)] if self.floats else [(keys, values)])
        return Recent(self.end + keys.shape[2], floats)

    def of(self, levels: slice) -> Recent:
        """Returns these cells of some of the levels."""
        return Recent(self.end, self.floats and (self.floats[0][levels], self.floats[1][levels]))


NONE = Recent()
"""No cells in float."""


def stacked(levels: Sequence[Recent]) -> Recent:
    """Returns the newest cells of all levels of a stack that are held in float on each of them."""
    length = min(recent.length for recent in levels)
    each = [recent.newest(length).floats for recent in levels]
    keys, values = zip(*(floats for floats in each if floats), strict=True) if length else ((), ())
    floats = (mx.concatenate(list(keys)), mx.concatenate(list(values))) if length else None
    return Recent(levels[0].end, floats)


class Track(NamedTuple):
    """The newest cells in float, and those before the last write, which may be taken back."""

    now: Recent
    before: Recent = NONE

    def then(self, start: int, keys: mx.array, values: mx.array, size: int) -> Track:
        """Returns the track after a write to the cells from `start` on; `size` older ones are kept."""
        found = self.ending(start)
        if start != found.end:
            found = found.newest(size, start) if found.begin < start < found.end else Recent(start)
        end, floats = found
        if floats is None:
            return Track(Recent(end + keys.shape[2], (keys, values)), found)
        # Decoding comes here for every layer and token, so this is `newest` and `then` in one.
        old_keys, old_values = floats
        if old_keys.shape[2] > size:
            old_keys, old_values = old_keys[:, :, -size:], old_values[:, :, -size:]
        floats = mx.concatenate([old_keys, keys], axis=2), mx.concatenate([old_values, values], axis=2)
        # The tokens of a forward see each other in float, so all of them stay until it is over.
        return Track(Recent(end + keys.shape[2], floats), Recent(end, (old_keys, old_values)))

    def ending(self, stop: int) -> Recent:
        """Returns the newest cells in float for a sequence whose last cell is the one before `stop`."""
        return self.before if self.before.end == stop != self.now.end else self.now

    def of(self, levels: slice) -> Track:
        """Returns the track of some of the levels."""
        return Track(self.now.of(levels), self.before.of(levels))

    def forgotten(self, size: int) -> Track:
        """Returns the track with `size` cells at most."""
        if self.now.length <= size:
            return self
        end, floats = self.now.newest(size)
        # A view would keep the whole array in memory.
        return self._replace(now=Recent(end, floats and (floats[0] + 0, floats[1] + 0)))


class Pair:
    """Keys and values of one segment in one layer, or of a stack of segments, whose levels come first.

    Writes assign to elements of the arrays, which builds and evaluates faster than `mx.slice_update`, but
    changes the array objects. A pair therefore has array objects of its own.
    """

    __slots__ = ("capacity", "form", "is_packed", "keys", "levels", "tracks", "values")

    def __init__(self, form: Form, keys: Lane, values: Lane, recent: Recent = NONE) -> None:
        self.form = form
        self.keys = keys.like(map(alias, keys.arrays))
        self.values = values.like(map(alias, values.arrays))
        self.levels, _, self.capacity, _ = keys.arrays[0].shape
        self.is_packed = isinstance(keys, Packed) or isinstance(values, Packed)
        self.tracks = {(0, self.levels): Track(recent)}
        """The newest cells in float, for each run of levels [low, high) that are written together; always
        empty unless the pair is packed and its form has `recent`."""

    def copy(self, cells: int = 0) -> Pair:
        """Returns a pair of the same contents, which writes to this one do not change.

        It is extended with zeros to this number of cells.
        """
        pair = Pair(self.form, *self.grown(cells))
        pair.tracks = dict(self.tracks)
        return pair

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays."""
        if self.is_packed:
            arrays = *self.keys.arrays, *self.values.arrays
            for track in self.tracks.values():
                arrays += track.now.floats or ()
            return arrays
        return self.keys[0], self.values[0]

    def write(self, index: Index, keys: mx.array, values: mx.array) -> None:
        """Writes tokens to some cells; evaluation does so in place, if there are no views of the arrays."""
        if self.is_packed:
            self.keys.write(index, keys)
            self.values.write(index, values)
            if self.form.recent:
                low, high, _ = index[0].indices(self.levels)
                track = self.tracks.get((low, high)) or self._track_of(low, high)
                self.tracks[low, high] = track.then(index[2].start, keys, values, self.form.recent)
        else:
            self.keys[0][index], self.values[0][index] = keys, values

    def _track_of(self, low: int, high: int) -> Track:
        """Makes a track of levels that were written apart, or with others, until now."""
        inside = []
        for (first, stop), track in sorted(self.tracks.items()):
            if first < high and low < stop:
                del self.tracks[first, stop]
                if first < low:
                    self.tracks[first, low] = track.of(slice(0, low - first))
                if high < stop:
                    self.tracks[high, stop] = track.of(slice(high - first, stop - first))
                inside.append(track.of(slice(max(low - first, 0), min(high, stop) - first)))
        if len(inside) == 1:
            return inside[0]
        each = [track.now for track in inside]
        return Track(stacked(each) if len({recent.end for recent in each}) == 1 else NONE)

    def forget(self) -> None:
        """Drops the cells in float that the next forward does not see."""
        self.tracks = {levels: track.forgotten(self.form.recent) for levels, track in self.tracks.items()}

    def assign(self, index: Index, lanes: Lanes) -> None:
        """Writes cells that are stored as these are."""
        for own, new in zip((self.keys, self.values), lanes, strict=True):
            for array, cells in zip(own.arrays, new.arrays, strict=True):
                array[index] = cells

    def grown(self, cells: int) -> Lanes:
        """Returns its lanes with zeros up to this number of cells."""
        keys, values = (
            lane.like(grown(array, cells) for array in lane.arrays) for lane in (self.keys, self.values)
        )
        return keys, values

    def replace(self, lanes: Lanes, cells: int) -> None:
        """Replaces its lanes by those that have grown to this number of cells."""
        try:
            (self.keys, self.values), self.capacity = lanes, cells
        except BaseException:
            self.keys, self.values = self.lanes(index_of(0, self.capacity))
            raise

    def read(self, index: Index) -> tuple[mx.array, mx.array]:
        """Returns some cells in float: views if they are stored so."""
        if self.is_packed:
            return self.form.decoded(self.lanes(index))
        return self.keys[0][index], self.values[0][index]

    def lanes(self, index: Index) -> Lanes:
        """Returns views of some cells."""
        return self.keys.at(index), self.values.at(index)

    def newest(self, index: Index) -> list[Lanes]:
        """Returns views of some cells, those in float that are held in float, too."""
        if not self.form.recent:
            return [self.lanes(index)]
        levels, heads, cells = index
        recent = self._recent(index)
        border = _border(cells, recent)
        found = [self.lanes((levels, heads, slice(cells.start, border)))] if cells.start < border else []
        if border < cells.stop:
            keys, values = recent.at(border, cells.stop)
            found.append((Plain(keys), Plain(values)))
        return found

    def border(self, index: Index) -> int:
        """Returns the first of some cells that `newest` returns in float, or the one after them."""
        return _border(index[2], self._recent(index))

    def _recent(self, index: Index) -> Recent:
        """The newest cells in float of levels that are written together; none for others."""
        low, high, _ = index[0].indices(self.levels)
        if track := self.tracks.get((low, high)):
            return track.ending(index[2].stop)
        for (first, stop), track in self.tracks.items():
            if first <= low and high <= stop:
                return track.ending(index[2].stop).of(slice(low - first, high - first))
        return NONE

    def read_newest(self, index: Index) -> tuple[mx.array, mx.array]:
        """As `read`, with those cells unrounded that are held in float, too."""
        if not self.form.recent:
            return self.read(index)
        return concatenated([self.form.decoded(lanes) for lanes in self.newest(index)])


def _border(cells: slice, recent: Recent) -> int:
    """The first of some cells that is held in float together with all after it, or the one after them."""
    end, floats = recent
    begin: int = max(cells.start, end - floats[0].shape[2]) if floats else end
    return begin if begin < cells.stop <= end else cells.stop


Rebase = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""Re-bases (layer, keys, values). Returns keys and values of the same shapes."""


class Buffers:
    """The pairs of one layer, by segment. The segments of a stack have one pair."""

    __slots__ = ("_levels", "form", "pairs", "written")

    def __init__(self, form: Form, levels: Mapping[int, Level]) -> None:
        self.form = form
        self._levels = levels
        self.pairs: dict[int, Pair] = {}
        self.written = 0
        """The name of the last step that wrote to this layer."""

    def pair(self, segment: int, cells: int, is_packed: bool) -> Pair:
        """Returns the pair of a segment. Creates it, or extends it with zeros to this number of cells."""
        pair = self.pairs[segment] = self.holding(segment, cells, is_packed)
        if segment in self._levels:
            self.pairs |= dict.fromkeys((s for s in self._levels[segment].stack if s in self._levels), pair)
        return pair

    def holding(self, segment: int, cells: int, is_packed: bool = False) -> Pair:
        """As `pair`, but leaves a segment without so many cells as it is, and returns an extended copy."""
        pair = self.pairs.get(segment)
        if pair is None:
            level = self._levels.get(segment)
            return Pair(self.form, *self.form.zeros(cells, is_packed, len(level.stack) if level else 1))
        return pair.copy(cells) if pair.capacity < cells else pair

    def index(self, segment: int, low: int, high: int) -> Index:
        """Returns the index of the cells [low, high) of a segment in its pair."""
        level = self._levels.get(segment)
        return index_of(low, high, level.height if level else None)

    def copies(self) -> dict[int, Pair]:
        """Returns copies of all pairs by segment, with one copy for a stack."""
        made = {id(pair): pair.copy() for pair in self.pairs.values()}
        return {segment: made[id(pair)] for segment, pair in self.pairs.items()}

    def read(self, spans: Iterable[Span]) -> list[tuple[mx.array, mx.array]]:
        """Returns the cells of spans in float: views if they are stored so. Unwritten cells are zeros."""
        return [self.holding(s, a + n).read(self.index(s, a, a + n)) for s, a, _, n in spans]

    def lanes(self, spans: Iterable[Span]) -> list[Lanes]:
        """Returns views of the cells of spans as they are stored. Unwritten cells are zeros."""
        return [self.holding(s, a + n).lanes(self.index(s, a, a + n)) for s, a, _, n in spans]

    def newest(self, spans: Spans) -> list[Lanes]:
        """As `lanes`, with the newest cells in float as far as they are held so."""
        if not (self.form.recent and spans):
            return self.lanes(spans)
        segment, start, _, length = spans[-1]
        index = self.index(segment, start, start + length)
        return [*self.lanes(spans[:-1]), *self.holding(segment, start + length).newest(index)]

    def nbytes(self, spans: Spans, packed: Container[int]) -> int:
        """Returns the bytes of the cells of a sequence, of which some segments are packed."""
        total = sum(span.length * self.form.cell_bytes(span.segment in packed) for span in spans)
        if self.form.recent and spans and spans[-1].segment in self.pairs:
            segment, start, _, length = spans[-1]
            border = self.pairs[segment].border(self.index(segment, start, start + length))
            total += (start + length - border) * self.form.cell_bytes(False)
        return total

    def read_newest(self, spans: Spans) -> list[tuple[mx.array, mx.array]]:
        """As `read`, with the newest cells unrounded as far as they are held in float, too."""
        if not self.form.recent:
            return self.read(spans)
        return [self.form.decoded(lanes) for lanes in self.newest(spans)]


TOGETHER = 1 << 21
"""Bytes of buffers that are evaluated together when segments grow, if a layer has fewer."""

Staged = dict[int, dict[int, Pair]]
"""New pairs by layer and segment, before `Store.adopt`."""


def arrays_in(staged: Staged) -> list[mx.array]:
    """Returns all arrays of new pairs."""
    each = {id(pair): pair for pairs in staged.values() for pair in pairs.values()}
    return [array for pair in each.values() for array in pair.arrays]


class Store:
    """The buffers of all layers.

    Args:
        dtype: the dtype in which K and V are written and read; None keeps that of each layer's first ones.
        quantization: the quantization of packed segments; None for float.
        levels: the places of the segments that are stacked.
    """

    def __init__(
        self,
        dtype: mx.Dtype | None,
        quantization: Quantization | None = None,
        levels: Mapping[int, Level] = MappingProxyType({}),
    ) -> None:
        self._dtype = dtype
        self._quantization = quantization
        self._levels = levels
        self.layers: dict[int, Buffers] = {}

    def codecs(self, layer: int) -> Codecs:
        """The codecs of a layer's keys and values in packed segments."""
        form = self.layers[layer].form
        return form.key_codec, form.value_codec

    def form_for(self, layer: int, keys: mx.array, values: mx.array) -> Form:
        """Returns the form of a layer whose first keys and values are these.

        Raises ValueError if these have wrong dimensions, or if head_dim is no multiple of the group size.
        """
        if keys.ndim != 4 or values.ndim != 4:
            raise ValueError(f"keys and values are {keys.shape} and {values.shape}, expected 4 dimensions")
        if not keys.shape[1] or not keys.shape[3]:
            raise ValueError(f"keys of layer {layer} are {keys.shape}, expected at least 1 head of 1 feature")
        form = Form(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, values.dtype)
        return self._with_codecs(layer, form)

    def accepted(self, layer: int, form: Form) -> Form:
        """Returns the form in which a layer stores tokens of `form`. Raises ValueError for other heads."""
        own = self.layers[layer].form if layer in self.layers else self._with_codecs(layer, form)
        if own[:3] != form[:3]:
            raise ValueError(
                f"layer {layer} has {form.heads} heads of {form.key_dim} and {form.value_dim} features for "
                f"keys and values, this cache has {own.heads} of {own.key_dim} and {own.value_dim}"
            )
        return own

    def _with_codecs(self, layer: int, form: Form) -> Form:
        """The form of a new layer for arrays of this form."""
        dtypes = self._dtype or form.key_dtype, self._dtype or form.value_dtype
        form = Form(*form[:3], *dtypes)
        if self._quantization is None:
            return form
        return form.packed_by(self._quantization.of(layer), f"layer {layer}", self._quantization.recent)

    def open(self, layer: int, form: Form) -> Buffers:
        """Creates the buffers of a layer. Layers of equal form share one `Form` object."""
        form = next((other.form for other in self.layers.values() if other.form == form), form)
        buffers = self.layers[layer] = Buffers(form, self._levels)
        return buffers

    def stage(self, placement: Placement, rebase: Rebase | None = None) -> Staged:
        """Returns the new pairs that the moves of a plan make; `rebase` re-bases their keys."""
        staged: Staged = {}
        for layer, buffers in self.layers.items() if placement.moves else ():
            pairs = staged[layer] = {}
            recent: dict[int, list[Recent]] = {}
            for segment, pieces, cell, _ in placement.moves:
                size = placement.capacity[segment], segment in placement.packed
                if segment in placement.levels:
                    stack, height = placement.levels[segment]
                    if segment not in pairs:
                        zeros = buffers.form.zeros(*size, levels=len(stack))
                        pairs |= dict.fromkeys(stack, Pair(buffers.form, *zeros))
                    for lanes, span in zip(buffers.lanes(pieces), pieces, strict=True):
                        index = index_of(cell, cell + span.length, height)
                        pairs[segment].assign(index, buffers.form.stored(lanes, size[1]))
                        cell += span.length
                    if buffers.form.recent and size[1]:
                        newest = buffers.form.recent_of(buffers.newest(pieces), cell)
                        recent.setdefault(stack[0], []).append(newest)
                elif rebase is None:
                    pairs[segment] = buffers.form.pair(buffers.newest(pieces), *size)
                else:
                    keys, values = rebase(layer, *concatenated(buffers.read(pieces)))
                    pairs[segment] = buffers.holding(segment, *size).copy()
                    pairs[segment].write(index_of(cell, cell + keys.shape[2]), keys, values)
                    pairs[segment].forget()
            for segment, levels in recent.items():
                pairs[segment].tracks = {(0, len(levels)): Track(stacked(levels))}
        return staged

    def adopt(self, staged: Staged) -> None:
        """Puts new pairs in place."""
        for layer, pairs in staged.items():
            self.layers[layer].pairs.update(pairs)

    def grow(self, capacity: Mapping[int, int]) -> None:
        """Extends these segments in all layers, some at a time, because MLX allocates before it frees.

        The device begins some while those before are waited for.
        """
        growing = {
            pair: cells
            for buffers in self.layers.values()
            for segment, cells in capacity.items()
            if (pair := buffers.pairs.get(segment)) and pair.capacity < cells
        }
        largest = max((sum(array.nbytes for array in pair.arrays) for pair in growing), default=1)
        at_once, pairs, waiting = max(1, TOGETHER // largest), [*growing], list[tuple[Pair, Lanes]]()
        for begin in range(0, len(pairs) + at_once, at_once):
            grown = [(pair, pair.grown(growing[pair])) for pair in pairs[begin : begin + at_once]]
            mx.async_eval([lane.arrays for _, lanes in grown for lane in lanes])  # type: ignore[no-untyped-call]
            if waiting:
                mx.eval([lane.arrays for _, lanes in waiting for lane in lanes])
            for pair, lanes in waiting:
                pair.replace(lanes, growing[pair])
            waiting = grown

    def drop(self, segments: Iterable[int]) -> None:
        for segment in segments:
            for buffers in self.layers.values():
                buffers.pairs.pop(segment, None)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays of all buffers."""
        return arrays_in({layer: buffers.pairs for layer, buffers in self.layers.items()})

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(array.nbytes for array in self.arrays)


def concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Concatenates pairs of K and V along the tokens. Returns a single pair as it is."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)
