"""Which rotation a model puts into what it caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx

from ..arrays.rope import RopeShift

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
