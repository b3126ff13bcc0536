"""Re-basing the tokens before a gap, while those after it stay untouched.

RoPE sees differences of positions only. So where a model's offset may run ahead of the number
of tokens, a removal leaves the tail alone and rotates the head towards it. Rotating a stored
key rounds it, and errors of many removals would add up; the head is therefore rotated from
copies as they were when first stored, so that a key is rounded twice however often it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from ..arrays.lanes import Lane, Plain, as_stored, copied
from ..cells.spans import Spans
from ..quantisation import Codecs
from .rotation import Rotation, Scheme, Slot


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
