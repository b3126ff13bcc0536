"""A cache for the states of recurrent layers: convolutions, state-space models, linear attention.

A state cannot be rolled back, so the cache keeps older states as checkpoints. If it is given the inputs of
the newest tokens and a function that runs the recurrence, it can compute the states between them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile

import mlx.core as mx

from ..arguments import whole
from ..batch import Batch, CausalOptions
from ..errors import CacheError, NotSupportedError
from .base import Pass, StreamCache, StreamPlan, checked_layer
from .checkpoints import Expendable, anchors, beyond, expendable
from .interface import Recurrent
from .plan import Plan
from .states import (
    NOTHING,
    Arrays,
    Note,
    Replay,
    State,
    Stream,
    arrays_in,
    checked_inputs,
    copied_arrays,
    filter_none,
    sizes_of,
)

__all__ = ["Arrays", "RecurrentCache", "RecurrentLayer", "Stream"]

Form = tuple[object, ...]
"""For each array of a state its number of axes and dtype, or None if it has always been None."""

EMPTY = Stream(0, {}, False)


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
    checkpoints that this needs, about one in `interval` tokens.

    Args:
        interval: the tokens between checkpoints while decoding, and inside long blocks.
        max_checkpoints: the most checkpoints of each sequence. The newest state and the checkpoints that
            `rewind` needs are not counted in any limit.
        max_bytes: the most bytes of checkpoints of each sequence, or None for no limit.
        replay: returns a layer's arrays after some tokens. Its arguments are the layer, the arrays before
            these tokens, or () if there are none, and the layer's inputs, each (1, n, ...). It must not
            have side effects.
        rewind: the number of newest tokens that can be removed, whichever they are. Needs `replay`.
        budget: the most bytes of checkpoints of all sequences together, or None for no limit. When a forward
            pass adds a checkpoint, others are dropped: first those of the sequences used longest ago.

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
        budget: int | None = None,
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
        self._budget = None if budget is None else whole(budget=budget)[0]
        self._replay = replay
        self._forms: dict[int, Form] = {}
        self._counts: dict[int, int] = {}
        """The number of arrays that each layer gives as inputs."""

    @property
    def nbytes(self) -> int:
        return sum(sizes_of(self.arrays()).values())

    def check(self) -> None:
        for stream in self._streams.values():
            assert stream.end > 0 or (stream.marks and not stream.states)
            assert all(0 < position <= stream.end for position in stream.states)
            edges = [edge for note in stream.inputs for edge in (note.begin, note.end)]
            assert edges == sorted(edges)
            assert not edges or stream.end >= edges[-1]
            assert sorted({*stream.marks}) == [*stream.marks]
            assert len(stream.marks) <= self._max_checkpoints

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
        return self.newest_state(sequence).get(layer, ())

    def newest_state(self, sequence: int) -> State:
        """Return the states of all layers after the sequence's last token."""
        self._check_ready()
        stream = self._streams.get(sequence, EMPTY)
        return stream.states.get(stream.end, NOTHING)

    def layer_nbytes(self, layer: int, sequence: int) -> int:
        """Return the bytes of one layer's state, checkpoints and inputs in one sequence."""
        self._check_ready()
        stream = self._streams.get(sequence)
        if stream is None:
            return 0
        states = [{layer: state[layer]} for state in stream.states.values() if layer in state]
        inputs = [note.layers[layer].arrays for note in stream.inputs if layer in note.layers]
        arrays = [*arrays_in(states), *(array for own in inputs for array in own)]
        return sum(sizes_of(arrays).values())

    def wanted(self, sequence: int | None = None) -> tuple[int, ...]:
        """Return the positions inside the batch at which checkpoints are useful, for `put(at=...)`.

        Marked positions are among them. In a batch of more than `rewind` tokens, one is `rewind` tokens
        before its end: with a state there, it is enough to give the `inputs` of the tokens after it.
        """
        (batch, begins, _), sequence = self._named(sequence)
        begin = begins[sequence]
        end = begin + len(batch.rows[sequence])
        first = begin - begin % self._interval + self._interval
        positions = range(first, end, self._interval)[-self._max_checkpoints or end :]
        return tuple(sorted({*positions, *self.borders(sequence, begin, end)}))

    def borders(self, sequence: int, begin: int, end: int) -> set[int]:
        """Return the positions between `begin` and `end` at which a batch of these tokens should put a state.

        They are the marks of the sequence and, in a batch of more than `rewind` tokens, the first token whose
        inputs are needed. Works between batches, too.
        """
        marks = self._streams.get(sequence, EMPTY).marks
        positions = {*marks, end - self._rewind} if self._rewind else {*marks}
        return {position for position in positions if begin < position < end}

    def mark(self, sequence: int, position: int) -> bool:
        """Mark a position as worth a checkpoint: these are dropped last.

        If the sequence can go back to the position, the checkpoint is made now. If the position is yet to
        come, a forward pass that ends there will make it, and `wanted` has it in a pass that crosses it. The
        cache keeps the newest `max_checkpoints` marks of a sequence; a fork has them, too.

        Returns:
            Whether there is or will be a checkpoint. If not, nothing has changed: the sequence cannot go back
            to the position, or there is no room beside other marks.

        Raises:
            ValueError: a number is negative.
        """
        self._check_ready()
        sequence, position = whole(sequence=sequence, position=position)
        if not position:
            return True
        stream = self._streams.get(sequence, EMPTY)
        marks = tuple(sorted({*stream.marks, position}))[-self._max_checkpoints or position :]
        held = stream if position > stream.end else stream.with_state(position, self._run)
        if held is None or position not in marks:
            return False
        keeps_newest = stream.keeps_newest or position == stream.end
        marked = self._thinned(held._replace(marks=marks, keeps_newest=keeps_newest))
        if position < stream.end and position not in marked.states:
            return False
        self._streams[sequence] = marked
        return True

    def arrays(self) -> list[mx.array]:
        """Return all arrays of states and inputs."""
        return [array for stream in self._streams.values() for array in stream.arrays]

    def written(self, sequence: int) -> list[mx.array]:
        """Return the arrays that the sequence's newest forward pass put."""
        return self._streams.get(sequence, EMPTY).written

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
        changes: dict[int, Stream] = {}
        used = self._next_use()
        adds_checkpoint = False
        for sequence, rows in batch.rows.items():
            old = self._streams.get(sequence, EMPTY)
            if not self._can_resume(sequence, old.end):
                raise NotSupportedError(
                    f"sequence {sequence} cannot go on at position {old.end}: the cache holds no state "
                    f"there; remove the tokens from {old.newest_before(old.end)} on and feed them again"
                )
            changes[sequence] = self._grown(old, old.end + len(rows))._replace(used=used)
            adds_checkpoint |= old.keeps_newest
        if self._budget is not None and adds_checkpoint:
            changes |= self._within_budget(self._budget, changes)
        return StreamPlan(self, changes, batch)

    def _plan_remove(
        self, sequence: int, begin: int, end: int | None, recurrent: Recurrent = "refuse"
    ) -> Plan:
        stream = self._streams.get(sequence)
        stop = self._clipped(sequence, end)
        if stream is not None and not stream.end and begin == 0 != end:
            # It has no tokens, only marks.
            return StreamPlan(self, {sequence: None})
        if stream is None or begin >= stop:
            return StreamPlan(self, {})
        if stop < stream.end:
            return StreamPlan(self, {sequence: self._without(sequence, stream, begin, stop, recurrent)})
        if stream.source(begin) is None:
            raise NotSupportedError(
                f"cannot cut sequence {sequence} at {begin}: there is no state at position {begin}; "
                f"the newest before it is at {stream.newest_before(begin)}"
            )
        return StreamPlan(self, {sequence: stream.cut(begin, self._run)})

    def _without(self, sequence: int, stream: Stream, begin: int, stop: int, recurrent: Recurrent) -> Stream:
        """Return the sequence without tokens from its middle."""
        asked = f"cannot remove [{begin}, {stop}) from sequence {sequence} of length {stream.end}: "
        if recurrent == "keep":
            return self._thinned(stream.without(begin, stop, self._run))
        if recurrent == "replay":
            result = stream.recomputed_without(begin, stop, self._run)
            if result is not None:
                return self._thinned(result)
            raise NotSupportedError(
                f'{asked}recurrent="replay" needs a state at {begin} and the inputs from {stop} on, but the '
                f"newest state before is at {stream.newest_before(begin)} and the inputs of {stream.ranges} "
                'are held; use recurrent="keep", or cut the sequence and feed the later tokens again'
            )
        raise NotSupportedError(
            f"{asked}later recurrent states contain these tokens; only the newest tokens can be removed, "
            'unless recurrent="keep" goes on with these states, or recurrent="replay" computes them again'
        )

    def _snapshot(self, sequence: int) -> Stream | None:
        """Return the sequence, with one more checkpoint.

        A file does not hold inputs. With a checkpoint just before the end, a loaded sequence can go back to
        read its last token again.
        """
        stream = self._streams.get(sequence)
        if not stream or not stream.end:
            return stream
        return stream.with_state(stream.newest_before(stream.end - 1), self._run)

    def _plan_restore(self, sequence: int, snapshot: Stream | None) -> Plan:
        """Plan to replace a sequence by a snapshot. Raises ValueError if its arrays do not fit this cache."""
        if snapshot is None:
            return StreamPlan(self, {sequence: None})
        for state in snapshot.states.values():
            for layer, arrays in state.items():
                self._checked_form(layer, arrays)
        notes = snapshot.inputs if self._rewind else ()
        stream = snapshot._replace(notes=notes, latest=None, used=self._next_use())
        # Without inputs it can go back only to checkpoints, so the newest one stays; see `_snapshot`.
        newest = max(p for p in stream.checkpoints if p < stream.end or not p)
        return StreamPlan(self, {sequence: self._thinned(stream, newest)})

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        source = self._streams.get(src)
        copied = source.cut(min(length, source.end), self._run) if source else None
        return StreamPlan(self, {dst: copied})

    def _plan_graft(self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent) -> Plan:
        asked = f"cannot append [{begin}, {end}) of sequence {source} to sequence {sequence}: "
        if recurrent == "refuse":
            raise NotSupportedError(
                f"{asked}recurrent states cannot be joined; "
                'recurrent="keep" goes on with the state of the source after these tokens'
            )
        given, old = self._streams[source], self._streams.get(sequence, EMPTY)
        held = given.with_state(end, self._run)
        if held is None:
            raise NotSupportedError(
                f"{asked}there is no state at position {end} of sequence {source}; "
                f"the newest before it is at {given.newest_before(end)}"
            )
        new_end = old.end + end - begin
        states = {**old.states, new_end: held.states.get(end, NOTHING)}
        appended = Stream(new_end, states, True, old.inputs, None, old.marks, self._next_use())
        return StreamPlan(self, {sequence: self._thinned(appended)})

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
        self.put_layers({layer: arrays}, sequence, at, {} if inputs is None else {layer: inputs}, row)

    def put_layers(
        self,
        state: State,
        sequence: int | None = None,
        at: int | None = None,
        inputs: Mapping[int, Sequence[mx.array]] | None = None,
        row: int = 0,
    ) -> None:
        """Store the states of several layers, as `put` does for one.

        Args:
            state: for each layer its arrays.
            inputs: for each layer its inputs, if they are known.
        """
        self._check_unfinished()
        (batch, begins, scratch), sequence = self._named(sequence)
        forms = {layer: self._checked_form(layer, arrays) for layer, arrays in state.items()}
        begin, n = begins[sequence], len(batch.rows[sequence])
        noted = {}
        for layer, given in (inputs or {}).items():
            if at is not None:
                raise ValueError(f"inputs are those of the state at the batch's end, got them with at={at}")
            own = checked_inputs(given, row, begin + n, n, layer, self._counts.get(layer))
            # While decoding, all rows share their arrays. In longer batches, sequences have slices.
            noted[layer] = own.copied() if len(batch) > len(batch.rows) else own
        if scratch is not None:
            for layer, arrays in state.items():
                scratch[layer] = tuple(array if array is None else mx.zeros_like(array) for array in arrays)
                mx.eval(filter_none(scratch[layer]))
            return
        stream = self._streams[sequence]
        position = stream.end if at is None else whole(at=at)[0]
        if not begin < position <= stream.end:
            raise ValueError(
                f"at={at} is outside the batch, which extends sequence {sequence} from {begin} to "
                f"{stream.end} tokens: at must be {begin + 1} to {stream.end}"
            )
        latest = stream.latest
        if at is None and self._rewind and (noted or latest):
            others = latest.layers.items() if latest else ()
            kept = {layer: own for layer, own in others if layer not in state}
            latest = Note(begin, stream.end, kept | noted)
        states = {**stream.states, position: {**stream.states.get(position, NOTHING), **state}}
        self._streams[sequence] = stream._replace(states=states, latest=latest)
        self._forms.update(forms)
        self._counts.update((layer, len(own.arrays)) for layer, own in noted.items())

    def _checked_form(self, layer: int, arrays: Arrays) -> Form:
        """Return the layer's form, extended by these arrays. Raises ValueError if they do not fit it."""
        form = tuple(None if array is None else (array.ndim, array.dtype) for array in arrays)
        known = self._forms.get(layer, form)
        if form == known:
            return known
        if len(form) != len(known) or any(a != b for a, b in zip(form, known, strict=True) if a and b):
            raise ValueError(f"the state of layer {layer} has (axes, dtype) {form}, before it had {known}")
        return tuple(new or old for new, old in zip(form, known, strict=True))

    def _get(self, layer: int, sequence: int | None) -> Arrays:
        (_, _, scratch), sequence = self._named(sequence)
        if scratch is not None:
            known: Arrays = scratch.get(layer, ())
            return known
        return self.newest(layer, sequence)

    def _run(self, layer: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        """Call `replay`, and check what it returns."""
        assert self._replay is not None
        after = tuple(self._replay(layer, arrays, inputs))
        self._checked_form(layer, after)
        return after

    def _grown(self, old: Stream, end: int) -> Stream:
        """Return the sequence with new tokens up to `end`, and without what is then too old."""
        states = dict(old.states)
        # A layer that is not put keeps its state.
        newest = states.get(old.end, NOTHING)
        if not old.keeps_newest:
            states.pop(old.end, None)
        states[end] = newest
        if old.latest and (copies := copied_arrays(old.latest)):
            # Once they are computed, the arrays that they were copied from can be freed. Only the thread that
            # made them can compute them.
            with suppress(RuntimeError):
                mx.async_eval(copies)  # type: ignore[no-untyped-call]
        keeps_newest = end - old.end > 1 or end % self._interval == 0 or end in old.marks
        stream = Stream(end, states, keeps_newest, old.inputs, None, old.marks)
        if stream.notes:
            base = max(p for p in stream.checkpoints if p <= max(0, end - self._rewind))
            old_notes = takewhile(lambda note: note.end <= base, stream.notes)
            stream = stream._replace(notes=stream.notes[len([*old_notes]) :])
        return self._thinned(stream, old.end) if old.keeps_newest else stream

    def _next_use(self) -> int:
        """Return a number above that of every sequence; 0 without a budget, which alone needs it."""
        return 0 if self._budget is None else 1 + max((s.used for s in self._streams.values()), default=0)

    def _thinned(self, stream: Stream, also: int | None = None) -> Stream:
        """Drop checkpoints beyond the limits of a sequence, but none that `rewind` needs; see `_needed`."""
        needed = self._needed(stream, also) | {stream.end}
        rest = {p: state for p, state in stream.states.items() if p not in needed}
        order = expendable(stream.states.keys() - {stream.end}, stream.end, needed, stream.marks)
        dropped = set()
        while len(rest) > self._max_checkpoints or self._exceeds_bytes(rest):
            dropped.add(position := next(order))
            del rest[position]
        return stream._replace(states={p: s for p, s in stream.states.items() if p not in dropped})

    def _exceeds_bytes(self, states: Mapping[int, State]) -> bool:
        if self._max_bytes is None:
            return False
        return sum(sizes_of(arrays_in(states.values())).values()) > self._max_bytes

    def _needed(self, stream: Stream, also: int | None = None) -> set[int]:
        """Return the checkpoints that are needed to go back by `rewind` tokens.

        `also` is another one, for instance the beginning of a forward pass whose inputs are yet to come.
        """
        if not self._rewind:
            return set()
        needed = anchors(stream.checkpoints, stream.ranges, stream.end - self._rewind, self._interval)
        return needed if also is None else needed | {also}

    def _within_budget(self, budget: int, changes: Mapping[int, Stream]) -> dict[int, Stream]:
        """Return further changes, which drop checkpoints beyond the budget of all sequences.

        The newest states of the batch's sequences in `changes` are still those before it.
        """
        streams = {**self._streams, **changes}
        found, uncounted = [], set[int]()
        for sequence, stream in sorted(streams.items(), key=lambda item: item[1].used):
            sizes = {p: sizes_of(arrays_in([state])) for p, state in stream.states.items()}
            newest = sizes.pop(stream.end, {})
            needed = self._needed(stream, self._end(sequence) if sequence in changes else None)
            if sequence not in changes:
                uncounted.update(newest)
            for position in needed & sizes.keys():
                uncounted.update(sizes.pop(position))
            order = expendable(stream.states.keys() - {stream.end}, stream.end, needed, stream.marks)
            found.append(Expendable(sequence, order, sizes))
        dropped: dict[int, Stream] = {}
        for sequence, position in beyond(budget, found, uncounted):
            stream = dropped.get(sequence, streams[sequence])
            left = {p: state for p, state in stream.states.items() if p != position}
            dropped[sequence] = stream._replace(states=left)
        return dropped
