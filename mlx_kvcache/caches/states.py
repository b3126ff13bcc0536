"""One sequence of a recurrence: its states at several positions, and the inputs of its newest tokens.

A state that is not held is computed from an earlier one with `replay`. A forward pass leaves one `Note` of
its layers' inputs in each of its sequences. All records are immutable, so forks share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import mlx.core as mx

from ..arguments import class_of, whole

Range = tuple[int, int]
"""Positions [begin, end)."""


class Inputs(NamedTuple):
    """One layer's inputs in one forward pass.

    Attributes:
        arrays: each (rows, m, ...).
        row: the row of the sequence.
        begin: the position of the first token on axis 1.
        is_copy: whether the arrays are copies, which no forward pass evaluates.
    """

    arrays: tuple[mx.array, ...]
    row: int
    begin: int
    is_copy: bool = False

    def copied(self) -> Inputs:
        """Return a copy of the sequence's row: a slice of a longer array would keep all of it in memory."""
        arrays = tuple(mx.contiguous(array[self.row : self.row + 1]) for array in self.arrays)
        return Inputs(arrays, 0, self.begin, is_copy=True)

    def cut(self, begin: int, end: int) -> list[mx.array]:
        """Return the inputs (1, end - begin, ...) of the tokens [begin, end)."""
        tokens = slice(begin - self.begin, end - self.begin)
        return [array[self.row : self.row + 1, tokens] for array in self.arrays]


class Note(NamedTuple):
    """The inputs of all layers at the tokens [begin, end), which one forward pass added.

    Attributes:
        follows: whether the states at these tokens follow from those before. They do not if tokens in
            between were removed, but not from the states.
    """

    begin: int
    end: int
    layers: Mapping[int, Inputs]
    follows: bool = True

    def moved(self, offset: int) -> Note:
        """Return the note of the same tokens at other positions."""
        layers = {n: own._replace(begin=own.begin + offset) for n, own in self.layers.items()}
        return Note(self.begin + offset, self.end + offset, layers, self.follows)


Notes = tuple[Note, ...]
"""Notes by rising position. They do not overlap, and may leave gaps."""


def within(notes: Notes, begin: int, end: int) -> Notes:
    """Return the notes of the tokens [begin, end)."""
    return tuple(
        note._replace(begin=max(begin, note.begin), end=min(end, note.end))
        for note in notes
        if note.begin < end and begin < note.end
    )


def covered(notes: Notes, layers: Set[int]) -> list[Range]:
    """Return the ranges of tokens whose inputs are known for all of these layers.

    Neighbors are joined where the states of one follow from those of the other.
    """
    ranges: list[Range] = []
    for note in notes:
        if note.layers.keys() >= layers:
            begin = max([note.begin, *(note.layers[layer].begin for layer in layers)])
            if ranges and ranges[-1][1] == begin and note.follows:
                ranges[-1] = ranges[-1][0], note.end
            elif begin < note.end:
                ranges.append((begin, note.end))
    return ranges


def joined(notes: Notes, layer: int) -> tuple[mx.array, ...]:
    """Return one layer's inputs at the tokens of all these notes, each (1, n, ...)."""
    pieces = [note.layers[layer].cut(note.begin, note.end) for note in notes]
    return tuple(mx.concatenate(list(slot), axis=1) for slot in zip(*pieces, strict=True))


def noted_arrays(notes: Iterable[Note]) -> Iterator[mx.array]:
    """Yield all arrays of some notes."""
    for note in notes:
        for inputs in note.layers.values():
            yield from inputs.arrays


def copied_arrays(note: Note) -> list[mx.array]:
    """Return the arrays of a note that are copies."""
    return [array for inputs in note.layers.values() if inputs.is_copy for array in inputs.arrays]


def checked_inputs(
    inputs: Sequence[mx.array], row: int, end: int, n: int, layer: int, count: int | None
) -> Inputs:
    """Check a layer's inputs and return them, to be noted.

    Args:
        inputs: arrays (rows, m, ...) of the last m tokens before `end`.
        row: the row of the sequence.
        end: the position after the last token.
        n: the number of tokens of the sequence in the batch.
        layer: the layer, for messages.
        count: the number of arrays that the layer must have; None for any.

    Raises:
        TypeError: `inputs` is not a sequence of arrays.
        ValueError: the number of arrays, a shape or the row is wrong.
    """
    parts = inputs if isinstance(inputs, (list, tuple)) else [None]
    if not all(isinstance(part, mx.array) for part in parts):
        got = [class_of(part) for part in inputs] if parts is inputs else class_of(inputs)
        raise TypeError(f"inputs of layer {layer} must be a list or tuple of arrays, got {got}")
    arrays = tuple(inputs)
    if not arrays or len(arrays) != (count or len(arrays)):
        expected = f"{count}, as before" if count else "1 or more"
        raise ValueError(f"layer {layer} has {len(arrays)} arrays as inputs, expected {expected}")
    shapes = [tuple(array.shape) for array in arrays]
    (row,) = whole(row=row)
    lengths = {shape[1] if len(shape) > 1 else 0 for shape in shapes}
    if len(lengths) > 1 or not 1 <= min(lengths) <= n:
        raise ValueError(
            f"inputs of layer {layer} are {shapes}, expected (rows, m, ...) with the same m, from 1 to {n}, "
            f"because the batch has {n} tokens of the sequence"
        )
    if any(row >= shape[0] for shape in shapes):
        raise ValueError(
            f"row={row} of the inputs of layer {layer} does not exist: their shapes are {shapes}"
        )
    return Inputs(arrays, row, end - lengths.pop())


Arrays = tuple[mx.array | None, ...]
"""One layer's state. MLX arrays are immutable, so sharing and keeping old states copies nothing."""

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
        marks: the positions that the user has marked, by rising position. They may lie beyond `end`.
        used: a number that is higher the later the sequence was last used.
    """

    end: int
    states: Mapping[int, State]
    keeps_newest: bool
    notes: Notes = ()
    latest: Note | None = None
    marks: tuple[int, ...] = ()
    used: int = 0

    @property
    def inputs(self) -> Notes:
        """All notes."""
        return (*self.notes, self.latest) if self.latest else self.notes

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays of states and inputs."""
        return [*arrays_in(self.states.values()), *noted_arrays(self.inputs)]

    @property
    def written(self) -> list[mx.array]:
        """The arrays that the newest forward pass put: the state at its end and its inputs."""
        return [
            *arrays_in([self.states.get(self.end, NOTHING)]),
            *noted_arrays([self.latest] if self.latest else []),
        ]

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

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges of tokens whose inputs are known for all layers."""
        return covered(self.inputs, self.layers)

    def source(self, position: int) -> int | None:
        """Return the checkpoint from which to compute the state at `position`; None if that is impossible.

        It is `position` itself if there is a checkpoint.
        """
        if not position or (position in self.states and self.states[position].keys() >= self.layers):
            return position
        newest = max(p for p in self.checkpoints if p <= position)
        return newest if any(a <= newest and position <= b for a, b in self.ranges) else None

    def newest_before(self, position: int) -> int:
        """Return the newest position <= `position` that the sequence can go back to."""
        points = [p for p in self.checkpoints if p <= position]
        ranges = [(a, min(b, position)) for a, b in self.ranges]
        return max([*points, *(b for a, b in ranges if any(a <= p <= b for p in points))])

    def with_state(self, position: int, replay: Replay) -> Stream | None:
        """Return the sequence with a state at `position`, or None if that is impossible."""
        source = self.source(position)
        if source is None or source == position:
            return None if source is None else self
        state = self._after(source, within(self.inputs, source, position), replay)
        return self._replace(states={**self.states, position: state})

    def cut(self, length: int, replay: Replay) -> Stream | None:
        """Return the first `length` tokens, or None for none. They may lack a state at their end."""
        if not length:
            return None
        if length == self.end:
            return self._replace(keeps_newest=True)
        states = (self.with_state(length, replay) or self).states
        return self._replace(
            end=length,
            states={p: state for p, state in states.items() if p <= length},
            keeps_newest=True,
            notes=within(self.inputs, 0, length),
            latest=None,
            marks=tuple(mark for mark in self.marks if mark <= length),
        )

    def without(self, begin: int, stop: int, replay: Replay) -> Stream:
        """Remove the tokens [begin, stop), but not from the states after them, which move down.

        Going back to a position from `begin` on leads to such a state. The state at `stop` becomes that at
        `begin` if it can be computed. Otherwise, the inputs up to the next checkpoint are of no more use.
        """
        gap = stop - begin
        # Position 0 always stands for no state.
        source = (self.with_state(stop, replay) if begin else None) or self
        first = min((p for p in source.checkpoints if p >= stop and p > gap), default=self.end)
        older = {p: state for p, state in self.states.items() if p <= begin}
        newer = {p - gap: state for p, state in source.states.items() if p >= first}
        # The states after these tokens do not follow from those before.
        later = self._moved(first, -gap, follows=False)
        return self._edited(begin, stop, older | newer, within(self.inputs, 0, begin) + later)

    def recomputed_without(self, begin: int, stop: int, replay: Replay) -> Stream | None:
        """Remove the tokens [begin, stop), also from the states: compute the newest one again.

        Returns None if that is impossible: the state at `begin` or later inputs are missing.
        """
        source = self.source(begin)
        if source is None or not any(a <= stop and self.end <= b for a, b in self.ranges):
            return None
        later = self._moved(stop, begin - stop, follows=True)
        state = self._after(source, within(self.inputs, source, begin) + later, replay)
        states = {p: own for p, own in self.states.items() if p <= begin} | {self.end - stop + begin: state}
        return self._edited(begin, stop, states, within(self.inputs, 0, begin) + later)

    def _after(self, source: int, notes: Notes, replay: Replay) -> State:
        """Compute the state after the tokens of these notes, which come after the checkpoint at `source`."""
        before = self.states.get(source, NOTHING)
        state = {layer: replay(layer, before.get(layer, ()), joined(notes, layer)) for layer in self.layers}
        # Here, a lack of memory changes nothing yet.
        mx.eval(arrays_in([state]))
        return state

    def _moved(self, begin: int, offset: int, follows: bool) -> Notes:
        """Return the inputs from `begin` on, at other positions."""
        notes = [note.moved(offset) for note in within(self.inputs, begin, self.end)]
        return tuple(note._replace(follows=follows) if note is notes[0] else note for note in notes)

    def _edited(self, begin: int, stop: int, states: Mapping[int, State], notes: Notes) -> Stream:
        """Return the sequence without the tokens [begin, stop), with these states and notes."""
        gap, outside = stop - begin, [mark for mark in self.marks if not begin < mark < stop]
        marks = sorted({mark if mark <= begin else mark - gap for mark in outside})
        return Stream(self.end - gap, states, True, notes, None, tuple(marks), self.used)


def filter_none(arrays: Iterable[mx.array | None]) -> list[mx.array]:
    """Return the arrays that are not None."""
    return [array for array in arrays if array is not None]


def arrays_in(states: Iterable[State]) -> list[mx.array]:
    """Return all arrays of some states."""
    return filter_none(array for state in states for own in state.values() for array in own)


def sizes_of(arrays: Iterable[mx.array]) -> dict[int, int]:
    """Return the bytes of each array by its id, so that shared ones count once."""
    return {id(array): array.nbytes for array in arrays}
