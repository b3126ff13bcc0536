"""One sequence of a recurrence: its states at several positions, and what edits make of them.

Records are immutable. A function that needs a state which is not held computes it with `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import NamedTuple

import mlx.core as mx

from .replay import Note, Notes, covered, joined, noted_arrays, within

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
