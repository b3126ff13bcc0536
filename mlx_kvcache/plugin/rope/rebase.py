"""Which rotation a model puts into what it caches.

Re-basing the tokens before a gap, while those after it stay untouched.

RoPE sees differences of positions only. So where a model's offset may run ahead of the number
of tokens, a removal leaves the tail alone and rotates the head towards it. Rotating a stored
key rounds it, and errors of many removals would add up; the head is therefore rotated from
copies as they were when first stored, so that a key is rounded twice however often it moves.
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

Slot = Literal[0, 1]
"""Which of a layer's two arrays: keys or values."""


class Rotation(NamedTuple):
    """What carries RoPE in a layer: the features from `start` on, of one of its arrays or both.

    It is the values where a model caches a latent as keys and the rotated part beside it, and
    both where an index stores its keys twice.
    """

    shift: RopeShift
    slots: tuple[Slot, ...]
    start: int

    def apply(self, array: mx.array, offset: int) -> mx.array:
        """The array (1, heads, m, dim) with `offset` added to each of its m positions."""
        offsets = mx.full((array.shape[2],), offset, mx.int32)
        if self.start == 0:
            return self.shift(0, array, offsets)
        fixed, rotated = mx.split(array, [self.start], axis=-1)
        return mx.concatenate([fixed, self.shift(0, rotated, offsets)], axis=-1)


def rebased(
    rotation: Rotation | None, keys: mx.array, values: mx.array, offset: int
) -> tuple[mx.array, mx.array]:
    """K and V with `offset` added to the positions of those that carry them."""
    slots = rotation.slots if rotation else ()
    keys, values = (
        rotation.apply(array, offset) if rotation and slot in slots else array
        for slot, array in enumerate((keys, values))
    )
    return keys, values


@dataclass(frozen=True)
class Scheme:
    """How a model tells positions apart.

    Attributes:
        rotations: for each leaf, the rotation of what it caches; None where there is none.
        ahead: the model's output depends on differences of positions only, so the offset
            that it is given may exceed the number of tokens before.
        refusal: why tokens cannot be moved, or None if they can.
    """

    rotations: tuple[Rotation | None, ...]
    ahead: bool
    refusal: str | None = None


class Piece(NamedTuple):
    """Originals of the tokens [begin, end), at offset `lead`: what carries RoPE, by leaf and slot.

    They are in as many bits as the leaf stores them in.
    """

    begin: int
    end: int
    lead: int
    lanes: dict[tuple[int, Slot], Lane]

    def cut(self, begin: int, end: int) -> Piece | None:
        """What of it lies in [begin, end)."""
        begin, end = max(begin, self.begin), min(end, self.end)
        if begin >= end:
            return None
        if (begin, end) == (self.begin, self.end):
            return self
        index = slice(None), slice(None), slice(begin - self.begin, end - self.begin)
        lanes = {which: copied(lane.at(index)) for which, lane in self.lanes.items()}
        return Piece(begin, end, self.lead, lanes)


Pieces = tuple[Piece, ...]
"""Pieces by rising position, without overlap."""


@dataclass(frozen=True)
class Head:
    """A sequence's first tokens as they were first stored.

    `lead` is the model's offset less the position; `pieces` are for each of the pool's caches.
    """

    lead: int = 0
    pieces: dict[int, Pieces] = field(default_factory=dict)

    @property
    def arrays(self) -> list[mx.array]:
        """All originals."""
        lanes = (lane for own in self.pieces.values() for piece in own for lane in piece.lanes.values())
        return [array for lane in lanes for array in lane.arrays]

    def cut(self, length: int) -> Head:
        """The originals of the first `length` tokens at most."""
        kept = {
            kind: tuple(part for piece in pieces if (part := piece.cut(0, length)))
            for kind, pieces in self.pieces.items()
        }
        return Head(self.lead, kept)


class HeadRebase:
    """Rotates what one cache holds of a sequence's head, leaf by leaf, to a new lead.

    `pieces` is complete when every leaf has been called.

    Args:
        source: what is rotated, as spans.
        lead, new_lead: of the head now, and then.
        known: the originals that there are.
        codecs: of a leaf's two arrays, where the source is packed.
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
        rotation = self._scheme.rotations[leaf]
        if rotation is None:
            return keys, values
        arrays = [keys, values]
        for slot in rotation.slots:
            arrays[slot] = self._rotated(rotation, leaf, slot, arrays[slot])
        return arrays[0], arrays[1]

    def _rotated(self, rotation: Rotation, leaf: int, slot: Slot, stored: mx.array) -> mx.array:
        parts, done = [], 0
        for piece in self.pieces:
            size = piece.end - piece.begin
            if (leaf, slot) not in piece.lanes:
                original = Plain(stored[:, :, done : done + size])
                # A copy, as a view would keep the whole buffer alive.
                piece.lanes[leaf, slot] = copied(as_stored(original, self._codecs(leaf)[slot], stored.dtype))
            first = piece.lanes[leaf, slot].decoded(stored.dtype)
            parts.append(rotation.apply(first, self._new_lead - piece.lead))
            done += size
        return mx.concatenate(parts, axis=2)


def _covering(source: Spans, lead: int, known: Pieces) -> Iterator[Piece]:
    """Pieces of all that is in `source`: known ones, and new ones of what they leave out."""
    for span in source:
        at = span.position
        for piece in known:
            part = piece.cut(at, span.end)
            if part is None:
                continue
            if at < part.begin:
                yield Piece(at, part.begin, lead, {})
            yield part
            at = part.end
        if at < span.end:
            yield Piece(at, span.end, lead, {})
