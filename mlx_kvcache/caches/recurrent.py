"""A cache for the states of recurrent layers: convolutions, state-space models, linear attention.

A state cannot be rolled back, so the cache keeps older states as checkpoints. If it is given the inputs of
the newest tokens and a function that runs the recurrence, it can compute the states between them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import mlx.core as mx

from ..arguments import whole
from ..batch import Batch, CausalOptions
from ..errors import CacheError, NotSupportedError
from .base import Pass, StreamCache, StreamPlan, checked_layer
from .checkpoints import anchors, expendable
from .plan import Plan
from .replay import Note, Notes, checked_inputs, covered, joined, noted_arrays, within

Arrays = tuple[mx.array | None, ...]
"""One layer's state. MLX arrays are immutable, so sharing and keeping old states copies nothing."""

Form = tuple[object, ...]
"""For each array of a state its number of axes and dtype, or None if it has always been None."""

State = Mapping[int, Arrays]
"""The states of all layers at one position, by layer."""

Replay = Callable[[int, Arrays, tuple[mx.array, ...]], Arrays]
"""Returns a layer's state after some tokens, given the layer, its state before or (), and its inputs."""

NOTHING: State = {}


class Stream(NamedTuple):
    """A sequence.

    Attributes:
        end: its length in tokens.
        states: the newest state and the checkpoints, by position.
        keeps_newest: whether the state at `end` becomes a checkpoint when more tokens come.
        notes: the inputs of earlier forward passes.
        latest: the inputs of the newest forward pass, to which layers may still add theirs.
    """

    end: int
    states: Mapping[int, State]
    keeps_newest: bool
    notes: Notes = ()
    latest: Note | None = None

    @property
    def inputs(self) -> Notes:
        """All notes."""
        return (*self.notes, self.latest) if self.latest else self.notes

    @property
    def layers(self) -> Set[int]:
        """The layers that a state needs to be continued from."""
        if self.end in self.states:
            return self.states[self.end].keys()
        held = (*self.states.values(), *(note.layers for note in self.inputs))
        return {layer for layers in held for layer in layers}

    @property
    def checkpoints(self) -> list[int]:
        """The positions that can be continued from without computing a state, by rising position."""
        layers = self.layers
        return [0, *sorted(p for p, state in self.states.items() if state.keys() >= layers)]

    def source(self, position: int) -> int | None:
        """Return the checkpoint from which to compute the state at `position`; None if that is impossible.

        It is `position` itself if there is a checkpoint.
        """
        if not position or (position in self.states and self.states[position].keys() >= self.layers):
            return position
        newest = max(p for p in self.checkpoints if p <= position)
        ranges = covered(self.inputs, self.layers)
        return newest if any(a <= newest and position <= b for a, b in ranges) else None

    def newest_before(self, position: int) -> int:
        """Return the newest position <= `position` that the sequence can go back to."""
        points = [p for p in self.checkpoints if p <= position]
        ranges = [(a, min(b, position)) for a, b in covered(self.inputs, self.layers)]
        return max([*points, *(b for a, b in ranges if any(a <= p <= b for p in points))])


class RecurrentLayer:
    """A handle on one model layer: `put` and `get` without `set_layer`."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: RecurrentCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def put(
        self,
        *arrays: mx.array | None,
        sequence: int | None = None,
        at: int | None = None,
        inputs: Sequence[mx.array] | None = None,
        row: int = 0,
    ) -> None:
        """As `RecurrentCache.put`, for this layer."""
        self.cache._put(self.index, arrays, sequence, at, inputs, row)

    def get(self, sequence: int | None = None) -> Arrays:
        """As `RecurrentCache.get`, for this layer."""
        return self.cache._get(self.index, sequence)


class RecurrentCache(StreamCache[Stream]):
    """Cache for recurrent layers: holds the newest state of each sequence, and checkpoints to go back to.

    These positions become checkpoints: the end of each block of several tokens; every multiple of `interval`
    while decoding; and each position inside a block for which the model puts a state (see `wanted`). If
    there are too many when the sequence's next batch begins, the cache drops those that lie closest together
    in proportion to their age. So recent checkpoints stay denser than old ones.

    With `replay`, a sequence can also go back to each of its newest `rewind` tokens. The model gives its
    layers' inputs to `put`, and the cache keeps those of the newest tokens. To go back, it calls `replay` for
    each layer with the state at the last checkpoint before and the inputs since then. It keeps the
    checkpoints that this needs, about one in `interval` tokens, beyond the limits too.

    Args:
        interval: the tokens between checkpoints while decoding, and inside long blocks.
        max_checkpoints: the most checkpoints of each sequence, the newest state not counted.
        max_bytes: the most bytes of checkpoints of each sequence, or None for no limit.
        replay: returns a layer's arrays after some tokens. Its arguments are the layer, the arrays before
            these tokens, or () if there are none, and the layer's inputs, each (1, n, ...). It must not
            have side effects.
        rewind: the number of newest tokens that can be removed, whichever they are. Needs `replay`.

    Raises:
        ValueError: `interval` is below 1, a limit is negative, or `rewind` is given without `replay`.
    """

    def __init__(
        self,
        interval: int = 64,
        max_checkpoints: int = 16,
        max_bytes: int | None = None,
        *,
        replay: Replay | None = None,
        rewind: int = 0,
    ) -> None:
        super().__init__()
        (self._interval,) = whole(1, interval=interval)
        (self._max_checkpoints,) = whole(max_checkpoints=max_checkpoints)
        self._max_bytes = None if max_bytes is None else whole(max_bytes=max_bytes)[0]
        (self._rewind,) = whole(rewind=rewind)
        if self._rewind and replay is None:
            raise ValueError(
                f"rewind={rewind} needs a function that computes states again: give replay=, or rewind=0"
            )
        self._replay = replay
        self._forms: dict[int, Form] = {}
        self._counts: dict[int, int] = {}
        """The number of arrays that each layer gives as inputs."""

    @property
    def nbytes(self) -> int:
        return _nbytes(array for stream in self._streams.values() for array in _arrays_of(stream))

    def check(self) -> None:
        for stream in self._streams.values():
            assert stream.end > 0
            assert all(0 < position <= stream.end for position in stream.states)
            edges = [edge for note in stream.inputs for edge in (note.begin, note.end)]
            assert edges == sorted(edges)
            assert not edges or stream.end >= edges[-1]

    def layer(self, layer: int) -> RecurrentLayer:
        """Return a handle on one model layer. Raises ValueError if it is negative."""
        return RecurrentLayer(self, checked_layer(layer))

    def put(
        self,
        *arrays: mx.array | None,
        sequence: int | None = None,
        at: int | None = None,
        inputs: Sequence[mx.array] | None = None,
        row: int = 0,
    ) -> None:
        """Store a state of the current layer.

        Args:
            arrays: the state's arrays, of any shapes; each may be None.
            sequence: the sequence; may be None if the batch has only one.
            at: a position inside the batch, to store the state after the token at `at` - 1 as a checkpoint.
                None stores the state at the batch's end.
            inputs: what the layer computed this state from, for `replay`: arrays (rows, m, ...) of the last m
                of the sequence's tokens in the batch. Fewer than all are enough if the batch has more than
                `rewind` tokens and a state is put at the first of them; see `wanted`. Not with `at`.
            row: the row of the inputs that belongs to the sequence. Several sequences may share the arrays.

        Raises:
            ValueError: the number of arrays, their number of axes or a dtype differs from the layer's
                earlier states, `at` is outside the batch, or `inputs` do not fit the batch or the layer.
            TypeError: `inputs` is not a list or tuple of arrays.
            CacheError: no forward pass has begun, its `forward` block is over, or the batch has several
                sequences and `sequence` names none of them.
        """
        self._put(self._layer, arrays, sequence, at, inputs, row)

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
        """Return the bytes of one layer's state, checkpoints and inputs in one sequence."""
        self._check_ready()
        stream = self._streams.get(sequence)
        if stream is None:
            return 0
        states = [{layer: state[layer]} for state in stream.states.values() if layer in state]
        inputs = [note.layers[layer].arrays for note in stream.inputs if layer in note.layers]
        return _nbytes([*arrays_in(states), *(array for arrays in inputs for array in arrays)])

    def wanted(self, sequence: int | None = None) -> tuple[int, ...]:
        """Return the positions inside the batch at which checkpoints are useful, for `put(at=...)`.

        In a batch of more than `rewind` tokens, one is `rewind` tokens before its end: with a state there, it
        is enough to give the `inputs` of the tokens after it.
        """
        (batch, begins, _), sequence = self._named(sequence)
        begin = begins[sequence]
        end = begin + len(batch.rows[sequence])
        first = begin - begin % self._interval + self._interval
        positions = set(range(first, end, self._interval)[-self._max_checkpoints or end :])
        if self._rewind and end - self._rewind > begin:
            positions.add(end - self._rewind)
        return tuple(sorted(positions))

    def prepare_restore(self, sequence: int, position: int) -> int | None:
        """Return the newest position <= `position` from which the sequence can continue; None if unknown.

        To continue there, call `remove(sequence, found)` and feed the later tokens again.

        Raises:
            ValueError: a number is negative.
        """
        self._check_ready()
        sequence, position = whole(sequence=sequence, position=position)
        stream = self._streams.get(sequence)
        return stream.newest_before(position) if stream else None

    def _close(self) -> None:
        super()._close()
        self._forms, self._counts = {}, {}

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
            changes[sequence] = self._grown(old, begin + len(rows))
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
        return StreamPlan(self, {sequence: self._cut(stream, begin)})

    def _snapshot(self, sequence: int) -> Stream | None:
        """Return the sequence, with one more checkpoint.

        A file does not hold notes. With a checkpoint just before the end, a loaded sequence can go back to
        read its last token again.
        """
        stream = self._streams.get(sequence)
        if stream is None:
            return None
        states = self._with_state(stream, stream.newest_before(stream.end - 1))
        return stream._replace(states=states or stream.states)

    def _plan_restore(self, sequence: int, snapshot: Stream | None) -> Plan:
        """Plan to replace a sequence by a snapshot. Raises ValueError if its arrays do not fit this cache."""
        if snapshot is None:
            return StreamPlan(self, {sequence: None})
        for state in snapshot.states.values():
            for layer, arrays in state.items():
                self._checked_form(layer, arrays)
        notes = snapshot.inputs if self._rewind else ()
        stream = snapshot._replace(notes=notes, latest=None)
        return StreamPlan(self, {sequence: self._thinned(stream)})

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        source = self._streams.get(src)
        return StreamPlan(self, {dst: self._cut(source, min(length, source.end)) if source else None})

    def _set_causal(self, options: CausalOptions) -> None:
        raise NotSupportedError(
            "set_causal on a recurrent cache: it has no mask, so no token can see later ones"
        )

    def _can_resume(self, sequence: int, position: int) -> bool:
        stream = self._streams.get(sequence)
        return stream.source(position) is not None if stream else position == 0

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

    def _put(
        self,
        layer: int,
        arrays: Arrays,
        sequence: int | None,
        at: int | None,
        inputs: Sequence[mx.array] | None = None,
        row: int = 0,
    ) -> None:
        self._check_unfinished()
        (batch, begins, scratch), sequence = self._named(sequence)
        form = self._checked_form(layer, arrays)
        begin, n = begins[sequence], len(batch.rows[sequence])
        own = None
        if inputs is not None:
            if at is not None:
                raise ValueError(f"inputs are those of the state at the batch's end, got them with at={at}")
            own = checked_inputs(inputs, row, begin + n, n, layer, self._counts.get(layer))
        if scratch is not None:
            scratch[layer] = tuple(array if array is None else mx.zeros_like(array) for array in arrays)
            mx.eval([array for array in scratch[layer] if array is not None])
            return
        stream = self._streams[sequence]
        position = stream.end if at is None else whole(at=at)[0]
        if not begin < position <= stream.end:
            raise ValueError(
                f"at={at} is outside the batch, which extends sequence {sequence} from {begin} to "
                f"{stream.end} tokens: at must be {begin + 1} to {stream.end}"
            )
        states = {**stream.states, position: {**stream.states.get(position, NOTHING), layer: arrays}}
        latest = stream.latest
        if at is None and self._rewind and (own or latest):
            layers = dict(latest.layers) if latest else {}
            layers.pop(layer, None)
            latest = Note(begin, stream.end, layers | {layer: own} if own else layers)
        self._streams[sequence] = stream._replace(states=states, latest=latest)
        self._forms[layer] = form
        if own:
            self._counts[layer] = len(own.arrays)

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

    def _grown(self, old: Stream, end: int) -> Stream:
        """Return the sequence when more tokens come: with new tokens up to `end`, without what is too old."""
        states = dict(old.states)
        # A layer that is not put keeps its state.
        newest = states.get(old.end, NOTHING)
        if not old.keeps_newest:
            states.pop(old.end, None)
        states[end] = newest
        keeps_newest = end - old.end > 1 or end % self._interval == 0
        if old.latest and old.latest.end - old.latest.begin > 1:
            # What was copied from a long block is computed, so that the block can be freed.
            mx.async_eval(list(noted_arrays([old.latest])))
        stream = Stream(end, states, keeps_newest, old.inputs)
        if stream.notes:
            base = max(p for p in stream.checkpoints if p <= max(0, end - self._rewind))
            stream = stream._replace(notes=tuple(note for note in stream.notes if note.end > base))
        return self._thinned(stream) if old.keeps_newest else stream

    def _thinned(self, stream: Stream) -> Stream:
        """Drop checkpoints beyond the limits."""
        states = dict(stream.states)
        newest = states.pop(stream.end, None)
        order = expendable(states, stream.end, self._needed(stream))
        while len(states) > self._max_checkpoints or self._exceeds_bytes(states):
            dropped = next(order, None)
            if dropped is None:
                break
            del states[dropped]
        if newest is not None:
            states[stream.end] = newest
        return stream._replace(states=states)

    def _exceeds_bytes(self, states: Mapping[int, State]) -> bool:
        return self._max_bytes is not None and _nbytes(arrays_in(states.values())) > self._max_bytes

    def _needed(self, stream: Stream) -> set[int]:
        """Return the checkpoints that are needed to go back by `rewind` tokens."""
        ranges = covered(stream.inputs, stream.layers)
        return anchors(stream.checkpoints, ranges, stream.end - self._rewind, self._interval)

    def _cut(self, stream: Stream, length: int) -> Stream | None:
        """Return the first `length` tokens of a stream, or None for none."""
        if not length:
            return None
        states = self._with_state(stream, length) or stream.states
        kept = {p: state for p, state in states.items() if p <= length}
        return Stream(length, kept, True, within(stream.inputs, 0, length))

    def _with_state(self, stream: Stream, position: int) -> Mapping[int, State] | None:
        """Return the states with one at `position`, computed if there is none; None if that is impossible."""
        source = stream.source(position)
        if source is None or source == position:
            return stream.states if source == position else None
        state = self._replayed(stream, source, within(stream.inputs, source, position))
        return {**stream.states, position: state}

    def _replayed(self, stream: Stream, source: int, notes: Notes) -> State:
        """Compute the state after the tokens of these notes, which come after the checkpoint at `source`."""
        assert self._replay is not None
        before, state = stream.states.get(source, NOTHING), {}
        for layer in stream.layers:
            state[layer] = tuple(self._replay(layer, before.get(layer, ()), joined(notes, layer)))
            self._checked_form(layer, state[layer])
        # Here, a lack of memory changes nothing yet.
        mx.eval(arrays_in([state]))
        return state


def filter_none(arrays: Iterable[mx.array | None]) -> list[mx.array]:
    """Return the arrays that are not None."""
    return [array for array in arrays if array is not None]


def arrays_in(states: Iterable[State]) -> list[mx.array]:
    """Return all arrays of some states."""
    return filter_none(array for state in states for own in state.values() for array in own)


def _arrays_of(stream: Stream) -> list[mx.array]:
    """Return all arrays of a sequence."""
    return [*arrays_in(stream.states.values()), *noted_arrays(stream.inputs)]


def _nbytes(arrays: Iterable[mx.array]) -> int:
    """The bytes of all arrays, shared ones counted once."""
    return sum({id(array): array.nbytes for array in arrays}.values())
