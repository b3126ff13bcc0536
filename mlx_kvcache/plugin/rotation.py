"""Which rotation a model puts into the keys it caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx

from ..arrays.rope import RopeShift

Slot = Literal["keys", "values"]


class Rotation(NamedTuple):
    """One of a layer's two arrays carries RoPE in its features from `start` on.

    It is the values where a model caches a latent as keys and the rotated part beside it.
    """

    shift: RopeShift
    slot: Slot
    start: int

    def apply(self, array: mx.array, offset: int) -> mx.array:
        """The array (1, heads, m, dim) with `offset` added to each of its m positions."""
        offsets = mx.full((array.shape[2],), offset, mx.int32)
        if self.start == 0:
            return self.shift(0, array, offsets)
        fixed, rotated = mx.split(array, [self.start], axis=-1)
        return mx.concatenate([fixed, self.shift(0, rotated, offsets)], axis=-1)


@dataclass(frozen=True)
class Scheme:
    """How a model tells positions apart.

    Attributes:
        rotations: for each layer, the rotation of what it caches; None where there is none.
        ahead: the model's output depends on differences of positions only, so the offset
            that it is given may exceed the number of tokens before.
        refusal: why tokens cannot be moved, or None if they can.
    """

    rotations: tuple[Rotation | None, ...]
    ahead: bool
    refusal: str | None = None
