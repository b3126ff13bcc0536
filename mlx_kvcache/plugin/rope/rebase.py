"""Re-bases cached keys (RoPE) after a removal without accumulating rounding errors.

RoPE attention depends only on differences of positions. If a model accepts an offset that is larger than
the number of tokens, a removal keeps the tokens after the gap (the tail) unchanged and rotates the tokens
before it (the head) towards them. Each rotation rounds the keys, so the head is always rotated from copies
of the originally stored keys: a key is rounded twice, no matter how many removals follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import mlx.core as mx

from ...cells.spans import Spans
from ...quantization import Codecs
from ...rope import RopeShift
from ...storage.codec import Lane, Plain, as_stored, copied
from .axes import NO_DELTAS, Deltas

Slot = Literal[0, 1]
"""Index of one of a layer's two arrays: keys (0) or values (1)."""


class Rotation(NamedTuple):
    """The rotated part of what a layer caches: the features from `start` on, of the arrays in `slots`.

    Usually these are the keys. They are the values if a model caches a latent as its keys and the
    rotated part as its values, and both if an index stores its keys twice.
    """

    shift: RopeShift
    slots: tuple[Slot, ...]
    start: int

    def apply(self, array: mx.array, offset: int) -> mx.array:
        """Return the array (1, heads, m, dim) with `offset` added to each of its m positions."""
        offsets = mx.full((array.shape[2],), offset, mx.int32)
        if self.start == 0:
            return self.shift(0, array, offsets)
        fixed, rotated = mx.split(array, [self.start], axis=-1)
        return mx.concatenate([fixed, self.shift(0, rotated, offsets)], axis=-1)


def rebased(
    rotation: Rotation | None, keys: mx.array, values: mx.array, offset: int
) -> tuple[mx.array, mx.array]:
    """Return keys and values with `offset` added to the positions of the arrays that are rotated."""
    arrays = [keys, values]
    if rotation:
        for slot in rotation.slots:
            arrays[slot] = rotation.apply(arrays[slot], offset)
    return arrays[0], arrays[1]


@dataclass(frozen=True)
class Scheme:
    """How a model encodes positions."""

    rotations: tuple[Rotation | None, ...]
    """For each leaf, the rotation of its cached arrays, or None."""
    ahead: bool
    """Whether the output depends on differences of positions only, so that offsets may run ahead."""
    refusal: str | None = None
    """Why tokens cannot be moved, or None if they can."""


class Piece(NamedTuple):
    """Original arrays of the tokens [begin, end) of a head, from when its lead was `lead`.

    `lanes` has the rotated arrays by leaf and slot, in the bit width in which the leaf stores them.
    """

    begin: int
    end: int
    lead: int
    lanes: dict[tuple[int, Slot], Lane]

    def cut(self, begin: int, end: int) -> Piece | None:
        """Return the part of the piece in [begin, end), or None if it is empty."""
        begin, end = max(begin, self.begin), min(end, self.end)
        if begin >= end:
            return None
        if (begin, end) == (self.begin, self.end):
            return self
        index = slice(None), slice(None), slice(begin - self.begin, end - self.begin)
        lanes = {which: copied(lane.at(index)) for which, lane in self.lanes.items()}
        return Piece(begin, end, self.lead, lanes)


Pieces = tuple[Piece, ...]
"""Pieces in order of position, without overlap."""


@dataclass(frozen=True)
class Head:
    """A sequence's tokens before its last gap, as they were first stored."""

    lead: int = 0
    """The model's offset minus the number of tokens."""
    pieces: dict[int, Pieces] = field(default_factory=dict)
    """The original arrays, for each of the pool's caches."""
    deltas: Deltas = NO_DELTAS
    """How far positions are from offsets because of pictures."""

    @property
    def arrays(self) -> list[mx.array]:
        lanes = (lane for own in self.pieces.values() for piece in own for lane in piece.lanes.values())
        return [array for lane in lanes for array in lane.arrays]

    def cut(self, length: int) -> Head:
        """Return the head of the first `length` tokens."""
        cut = {kind: [piece.cut(0, length) for piece in own] for kind, own in self.pieces.items()}
        kept = {kind: tuple(filter(None, own)) for kind, own in cut.items()}
        return Head(self.lead, kept, self.deltas.cut(length))


class HeadRebase:
    """Re-bases one cache's part of a sequence's head to a new lead, leaf by leaf.

    `pieces` is complete once it has been called for every leaf.

    Args:
        source: the spans to rotate.
        lead, new_lead: the head's lead before and after.
        known: the pieces that exist already.
        codecs: returns the codecs of a leaf's two arrays; (None, None) if the source is not quantized.
    """

    def __init__(
        self,
        scheme: Scheme,
        source: Spans,
        lead: int,
        new_lead: int,
        known: Pieces,
        codecs: Callable[[int], Codecs],
    ) -> None:
        self._scheme = scheme
        self._new_lead = new_lead
        self._codecs = codecs
        self.pieces: Pieces = tuple(_covering(source, lead, known))

    def __call__(self, leaf: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rotation, arrays = self._scheme.rotations[leaf], [keys, values]
        if rotation:
            for slot in rotation.slots:
                arrays[slot] = self._rotated(rotation, leaf, slot, arrays[slot])
        return arrays[0], arrays[1]

    def _rotated(self, rotation: Rotation, leaf: int, slot: Slot, stored: mx.array) -> mx.array:
        parts, done = [], 0
        for piece in self.pieces:
            size = piece.end - piece.begin
            if (leaf, slot) not in piece.lanes:
                original = Plain(stored[:, :, done : done + size])
                # Copied, because a view would keep the whole buffer alive.
                piece.lanes[leaf, slot] = copied(as_stored(original, self._codecs(leaf)[slot], stored.dtype))
            first = piece.lanes[leaf, slot].decoded(stored.dtype)
            parts.append(rotation.apply(first, self._new_lead - piece.lead))
            done += size
        return mx.concatenate(parts, axis=2)


def _covering(source: Spans, lead: int, known: Pieces) -> Iterator[Piece]:
    """Yield pieces that cover `source`: parts of known ones, and empty new ones in between."""
    for span in source:
        at = span.position
        for piece in known:
            if part := piece.cut(at, span.end):
                if at < part.begin:
                    yield Piece(at, part.begin, lead, {})
                yield part
                at = part.end
        if at < span.end:
            yield Piece(at, span.end, lead, {})
