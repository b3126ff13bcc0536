"""The inputs of recurrent layers at the newest tokens, from which their states can be computed again.

A forward pass leaves one `Note` in each of its sequences. Notes are immutable, so forks share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
