"""A cache for the states of recurrent layers: convolutions, state-space models, linear attention.

A state cannot be rolled back, so the cache keeps older states as checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mlx.core as mx

from ..arguments import whole
from ..batch import Batch, CausalOptions
from ..errors import CacheError, NotSupportedError
from .base import Pass, StreamCache, StreamPlan, checked_layer
from .plan import Plan

Arrays = tuple[mx.array | None, ...]
"""One layer's state. MLX arrays are immutable, so sharing and keeping old states copies nothing."""

Form = tuple[object, ...]
"""For each array of a state its number of axes and dtype, or None if it has always been None."""

State = Mapping[int, Arrays]
"""The states of all layers at one position, by layer."""

NOTHING: State = {}


class Stream(NamedTuple):
    """A sequence.

    Attributes:
        end: its length in tokens.
        states: the newest state and the checkpoints, by position.
        keeps_newest: whether the state at `end` becomes a checkpoint when more tokens come.
    """

    end: int
    states: Mapping[int, State]
    keeps_newest: bool


class RecurrentLayer:
    """A handle on one model layer: `put` and `get` without `set_layer`."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: RecurrentCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def put(self, *arrays: mx.array | None, sequence: int | None = None, at: int | None = None) -> None:
        """As `RecurrentCache.put`, for this layer."""
        self.cache._put(self.index, arrays, sequence, at)

    def get(self, sequence: int | None = None) -> Arrays:
        """As `RecurrentCache.get`, for this layer."""
        return self.cache._get(self.index, sequence)


class RecurrentCache(StreamCache[Stream]):
    """Cache for recurrent layers: holds the newest state of each sequence, and checkpoints to go back to.

    These positions become checkpoints: the end of each block of several tokens; every multiple of `interval`
    while decoding; and each position inside a block for which the model puts a state (see `wanted`). If
    there are too many when the sequence's next batch begins, the cache drops those that lie closest together
    in proportion to their age. So recent checkpoints stay denser than old ones.

    Args:
        interval: the tokens between checkpoints while decoding, and inside long blocks.
        max_checkpoints: the most checkpoints of each sequence, the newest state not counted.
        max_bytes: the most bytes of checkpoints of each sequence, or None for no limit.

    Raises:
        ValueError: `interval` is below 1, or a limit is negative.
    """

    def __init__(self, interval: int = 64, max_checkpoints: int = 16, max_bytes: int | None = None) -> None:
        super().__init__()
        (self._interval,) = whole(1, interval=interval)
        (self._max_checkpoints,) = whole(max_checkpoints=max_checkpoints)
        self._max_bytes = None if max_bytes is None else whole(max_bytes=max_bytes)[0]
        self._forms: dict[int, Form] = {}

    @property
    def nbytes(self) -> int:
        return _nbytes(state for stream in self._streams.values() for state in stream.states.values())

    def check(self) -> None:
        for end, states, _ in self._streams.values():
            assert end > 0
            assert all(0 < position <= end for position in states)

    def layer(self, layer: int) -> RecurrentLayer:
        """Return a handle on one model layer. Raises ValueError if it is negative."""
        return RecurrentLayer(self, checked_layer(layer))

    def put(self, *arrays: mx.array | None, sequence: int | None = None, at: int | None = None) -> None:
        """Store a state of the current layer.

        Args:
            arrays: the state's arrays, of any shapes; each may be None.
            sequence: the sequence; may be None if the batch has only one.
            at: a position inside the batch, to store the state after the token at `at` - 1 as a checkpoint.
                None stores the state at the batch's end.

        Raises:
            ValueError: the number of arrays, their number of axes or a dtype differs from the layer's
                earlier states, or `at` is outside the batch.
            CacheError: no forward pass has begun, its `forward` block is over, or the batch has several
                sequences and `sequence` names none of them.
        """
        self._put(self._layer, arrays, sequence, at)

    def get(self, sequence: int | None = None) -> Arrays:
        """Return the current layer's newest state: the one put in this batch, or else the one before it.

        Args:
            sequence: the sequence; may be None if the batch has only one.

        Returns:
            The state's arrays, or () if the sequence has none yet.

        Raises:
            CacheError: no forward pass has begun, or the batch has several sequences and `sequence` names
                none of them.
        """
        return self._get(self._layer, sequence)

    def newest(self, layer: int, sequence: int) -> Arrays:
        """Return a layer's state after the sequence's last token, or (). Works between batches, too."""
        self._check_ready()
        stream = self._streams.get(sequence)
        return stream.states.get(stream.end, NOTHING).get(layer, ()) if stream else ()

    def layer_nbytes(self, layer: int, sequence: int) -> int:
        """Return the bytes of one layer's state and checkpoints in one sequence."""
        self._check_ready()
        stream = self._streams.get(sequence)
        states = stream.states.values() if stream else ()
        return _nbytes({layer: state[layer]} for state in states if layer in state)

    def wanted(self, sequence: int | None = None) -> tuple[int, ...]:
        """Return the positions inside the batch at which checkpoints are useful, for `put(at=...)`."""
        (batch, begins, _), sequence = self._named(sequence)
        begin = begins[sequence]
        end = begin + len(batch.rows[sequence])
        first = begin - begin % self._interval + self._interval
        return tuple(range(first, end, self._interval))[-self._max_checkpoints or end :]

    def prepare_restore(self, sequence: int, position: int) -> int | None:
        """Return the newest position <= `position` from which the sequence can continue; None if unknown.

        To continue there, call `remove(sequence, found)` and feed the later tokens again.

        Raises:
            ValueError: a number is negative.
        """
        self._check_ready()
        sequence, position = whole(sequence=sequence, position=position)
        stream = self._streams.get(sequence)
        if stream is None:
            return None
        candidates = (p for p in stream.states if p <= position and self._can_resume(sequence, p))
        return max(candidates, default=0)

    def _close(self) -> None:
        super()._close()
        self._forms = {}

    def _plan_forward(self, batch: Batch) -> Plan:
        batch.check_continues(self._end)
        changes: dict[int, Stream | None] = {}
        for sequence, rows in batch.rows.items():
            old = self._streams.get(sequence, Stream(0, {}, False))
            begin = old.end
            if not self._can_resume(sequence, begin):
                raise NotSupportedError(
                    f"sequence {sequence} cannot go on at position {begin}: the cache holds no state there; "
                    f"remove the tokens from {self.prepare_restore(sequence, begin)} on and feed them again"
                )
            end = begin + len(rows)
            # A layer that is not put keeps its state.
            states = {**self._thinned(old), end: old.states.get(begin, NOTHING)}
            changes[sequence] = Stream(end, states, len(rows) > 1 or end % self._interval == 0)
        return StreamPlan(self, changes, batch)

    def _plan_remove(self, sequence: int, begin: int, end: int | None) -> Plan:
        stream = self._streams.get(sequence)
        stop = self._clipped(sequence, end)
        if stream is None or begin >= stop:
            return StreamPlan(self, {})
        if stop < stream.end:
            raise NotSupportedError(
                f"cannot remove [{begin}, {stop}) from sequence {sequence} of length {stream.end}: later "
                "recurrent states contain these tokens; only the newest tokens can be removed"
            )
        if not self._can_resume(sequence, begin):
            raise NotSupportedError(
                f"cannot cut sequence {sequence} at {begin}: there is no state at position {begin}; "
                f"the newest before it is at {self.prepare_restore(sequence, begin)}"
            )
        return StreamPlan(self, {sequence: _cut(stream, begin)})

    def _plan_restore(self, sequence: int, snapshot: Stream | None) -> Plan:
        """Plan to replace a sequence by a snapshot. Raises ValueError if its arrays do not fit this cache."""
        if snapshot is None:
            return StreamPlan(self, {sequence: None})
        for state in snapshot.states.values():
            for layer, arrays in state.items():
                self._checked_form(layer, arrays)
        older = {p: state for p, state in snapshot.states.items() if p < snapshot.end}
        states = self._thinned(Stream(snapshot.end, older, True))
        if snapshot.end in snapshot.states:
            states[snapshot.end] = snapshot.states[snapshot.end]
        return StreamPlan(self, {sequence: snapshot._replace(states=states)})

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        source = self._streams.get(src)
        return StreamPlan(self, {dst: _cut(source, min(length, source.end)) if source else None})

    def _set_causal(self, options: CausalOptions) -> None:
        raise NotSupportedError(
            "set_causal on a recurrent cache: it has no mask, so no token can see later ones"
        )

    def _can_resume(self, sequence: int, position: int) -> bool:
        if position == 0:
            return True
        stream = self._streams.get(sequence)
        if stream is None or position not in stream.states:
            return False
        # A checkpoint that was put for some layers only cannot be continued from.
        newest = stream.states.get(stream.end, NOTHING)
        return stream.states[position].keys() >= newest.keys()

    def _named(self, sequence: int | None) -> tuple[Pass, int]:
        under_way = self._under_way()
        rows = under_way.batch.rows
        if sequence is None and len(rows) == 1:
            return under_way, next(iter(rows))
        if sequence is None or sequence not in rows:
            raise CacheError(
                f"sequence={sequence} names none of the batch's {len(rows)} sequences: {sorted(rows)[:8]}"
            )
        return under_way, sequence

    def _put(self, layer: int, arrays: Arrays, sequence: int | None, at: int | None) -> None:
        self._check_unfinished()
        (_, begins, scratch), sequence = self._named(sequence)
        form = self._checked_form(layer, arrays)
        if scratch is not None:
            scratch[layer] = tuple(array if array is None else mx.zeros_like(array) for array in arrays)
            mx.eval([array for array in scratch[layer] if array is not None])
            return
        end, states, keeps = self._streams[sequence]
        position = end if at is None else whole(at=at)[0]
        if not begins[sequence] < position <= end:
            raise ValueError(
                f"at={at} is outside the batch, which extends sequence {sequence} from {begins[sequence]} to "
                f"{end} tokens: at must be {begins[sequence] + 1} to {end}"
            )
        state = {**states.get(position, NOTHING), layer: arrays}
        self._streams[sequence] = Stream(end, {**states, position: state}, keeps)
        self._forms[layer] = form

    def _checked_form(self, layer: int, arrays: Arrays) -> Form:
        """Return the layer's form, extended by these arrays. Raises ValueError if they do not fit it."""
        form = tuple(None if array is None else (array.ndim, array.dtype) for array in arrays)
        known = self._forms.get(layer, form)
        if len(form) != len(known) or any(a != b for a, b in zip(form, known, strict=True) if a and b):
            raise ValueError(f"the state of layer {layer} has (axes, dtype) {form}, before it had {known}")
        return tuple(new or old for new, old in zip(form, known, strict=True))

    def _get(self, layer: int, sequence: int | None) -> Arrays:
        (_, _, scratch), sequence = self._named(sequence)
        if scratch is not None:
            known: Arrays = scratch.get(layer, ())
            return known
        return self.newest(layer, sequence)

    def _thinned(self, stream: Stream) -> dict[int, State]:
        """Return the checkpoints that stay when more tokens come."""
        kept = dict(stream.states)
        if not stream.keeps_newest:
            kept.pop(stream.end, None)
        while len(kept) > self._max_checkpoints or self._exceeds_bytes(kept):
            del kept[_most_crowded(sorted(kept), stream.end)]
        return kept

    def _exceeds_bytes(self, states: Mapping[int, State]) -> bool:
        return self._max_bytes is not None and _nbytes(states.values()) > self._max_bytes


def filter_none(arrays: Iterable[mx.array | None]) -> list[mx.array]:
    """Return the arrays that are not None."""
    return [array for array in arrays if array is not None]


def arrays_in(states: Iterable[State]) -> list[mx.array]:
    """Return all arrays of some states."""
    return filter_none(array for state in states for own in state.values() for array in own)


def _nbytes(states: Iterable[State]) -> int:
    """The bytes of all arrays, shared ones counted once."""
    return sum({id(array): array.nbytes for array in arrays_in(states)}.values())


def _cut(stream: Stream, length: int) -> Stream | None:
    """Return the first `length` tokens of a stream, or None for none."""
    if not length:
        return None
    return Stream(length, {p: s for p, s in stream.states.items() if p <= length}, True)


def _most_crowded(positions: list[int], end: int) -> int:
    """Return the position whose neighbors lie closest together in proportion to its age."""

    def spread(index: int) -> float:
        before = positions[index - 1] if index else 0
        after = positions[index + 1] if index + 1 < len(positions) else end + 1
        return (after - before) / (end + 1 - positions[index])

    return positions[min(range(len(positions)), key=spread)]
