"""Re-basing keys: rotating stored keys as if their tokens stood elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import NotSupportedError

_LENGTH_DEPENDENT = (
    "its rotation is not a function of the difference of positions alone, "
    "so stored keys cannot be moved exactly"
)


@dataclass(frozen=True)
class RopeShift:
    """A `shift` hook for rotary embeddings: adds to the positions of rotated keys.

    Rotations about the same axes add up, so a key at p becomes the key at p + d by one more
    rotation of d (RoFormer, arXiv 2104.09864). A magnitude that YaRN or su-scaled RoPE puts
    on the keys commutes with rotation and stays as it is.

    Args:
        dims: how many of the first features are rotated.
        base, traditional, scale, freqs: as of `mx.fast.rope`; `freqs` (dims / 2,) takes the
            place of `base`.
    """

    dims: int
    base: float | None = 10000.0
    traditional: bool = False
    scale: float = 1.0
    freqs: mx.array | None = None

    def __call__(self, layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
        """Re-base keys (1, n_kv_heads, m, head_dim) by offsets (m,) int32, in float32."""
        rows = keys.astype(mx.float32).transpose(2, 1, 0, 3)
        rotated = mx.fast.rope(
            rows,
            self.dims,
            traditional=self.traditional,
            base=None if self.freqs is not None else self.base,
            scale=self.scale,
            offset=offsets,
            freqs=self.freqs,
        )
        return rotated.transpose(2, 1, 0, 3).astype(keys.dtype)

    @classmethod
    def of(cls, module: Any) -> RopeShift:
        """Read the rotation out of an MLX RoPE module, and verify it against the module.

        `mlx.nn.RoPE` and modules that hold their frequencies as `_freqs` are read.

        Raises:
            NotSupportedError: the module is not understood, or depends on the length, as
                dynamic NTK does.
        """
        name = type(module).__name__
        dims = getattr(module, "dims", getattr(module, "dim", None))
        if not isinstance(dims, int):
            raise NotSupportedError(f"{name} has no dims that tell how many features it rotates")
        freqs = getattr(module, "_freqs", None)
        base, scale = getattr(module, "base", None), getattr(module, "scale", 1.0)
        if freqs is None and base is None:
            raise NotSupportedError(f"{name} has neither _freqs nor a base to rotate by")
        traditional = bool(getattr(module, "traditional", False))
        if freqs is not None:
            base, scale = None, 1.0
        shift = cls(dims, base, traditional, scale, freqs)
        longest = getattr(module, "max_position_embeddings", None) or 0
        for distance in (5, longest + 7):
            if not shift._explains(module, distance):
                raise NotSupportedError(f"{name}({dims}): {_LENGTH_DEPENDENT}")
        return shift

    def _explains(self, module: nn.Module, distance: int) -> bool:
        """Whether the module at offset `distance` equals this rotation of its output at 0."""
        x = mx.random.normal((1, 1, 3, self.dims), key=mx.random.key(0))
        near, far = module(x, offset=0), module(x, offset=distance)
        error = mx.abs(self(0, near, mx.full((3,), distance, mx.int32)) - far).max()
        # Float32 angles are exact to about distance * 2**-24.
        return bool((error <= 1e-4 + distance * 1e-6).item())


rope_shift = RopeShift
