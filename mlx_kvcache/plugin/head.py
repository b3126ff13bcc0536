"""Re-basing the tokens before a gap, while those after it stay untouched.

RoPE sees differences of positions only. So where a model's offset may run ahead of the number
of tokens, a removal leaves the tail alone and rotates the head towards it. Rotating a stored
key rounds it, and errors of many removals would add up; the head is therefore rotated from
copies as they were when first stored, so that a key is rounded twice however often it moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from .rotation import Scheme


class Piece(NamedTuple):
    """Originals of neighbouring tokens: per layer the array that carries RoPE, at offset `lead`."""

    length: int
    lead: int
    arrays: dict[int, mx.array]

    def cut(self, length: int) -> Piece:
        if length >= self.length:
            return self
        return Piece(length, self.lead, {i: array[:, :, :length] + 0 for i, array in self.arrays.items()})


@dataclass
class Head:
    """Originals of a sequence's first tokens, from position 0 on; `lead` is offset minus position."""

    lead: int = 0
    pieces: tuple[Piece, ...] = ()

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def cut(self, length: int) -> Head:
        """The originals of the first `length` tokens at most."""
        kept = []
        for piece in self.pieces:
            if length > 0:
                kept.append(piece.cut(length))
            length -= piece.length
        return Head(self.lead, tuple(kept))


@dataclass
class HeadRebase:
    """Rotates the first `length` tokens to a lead that is `gap` higher, layer by layer.

    `moved` is the new head, complete when every layer has been called.
    """

    scheme: Scheme
    head: Head
    length: int
    gap: int
    fresh: dict[int, mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = self.head.cut(self.length)

    def __call__(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rotation = self.scheme.rotations[layer]
        if rotation is None:
            return keys, values
        stored = keys if rotation.slot == "keys" else values
        lead = self.head.lead + self.gap
        known = self._known
        originals = [(piece.arrays[layer], lead - piece.lead) for piece in known.pieces]
        if known.length < self.length:
            # The sum is a copy: a view would keep the whole buffer alive.
            self.fresh[layer] = stored[:, :, known.length : self.length] + 0
            originals.append((self.fresh[layer], self.gap))
        rotated = mx.concatenate([rotation.apply(array, by) for array, by in originals], axis=2)
        return (rotated, values) if rotation.slot == "keys" else (keys, rotated)

    @property
    def moved(self) -> Head:
        known, pieces = self._known, self._known.pieces
        if known.length < self.length:
            pieces += (Piece(self.length - known.length, self.head.lead, self.fresh),)
        return Head(self.head.lead + self.gap, pieces)
