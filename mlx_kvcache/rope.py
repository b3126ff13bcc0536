"""Re-bases keys: rotates stored keys with RoPE as if their tokens had other positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import NotSupportedError


@dataclass(frozen=True)
class RopeShift:
    """A `shift` hook for rotary embeddings: adds offsets to the positions of rotated keys.

    Rotations about the same axes add up, so rotating a key at p by d more gives the key at p + d
    (RoFormer, arXiv 2104.09864). YaRN and su-scaled RoPE also scale the keys; scaling commutes with
    rotation, so it stays correct.

    Args:
        dims: the number of features to rotate, from the first on.
        base, traditional, scale, freqs: as for `mx.fast.rope`; `freqs` (dims / 2,) replaces `base`.
    """

    dims: int
    base: float | None = 10000.0
    traditional: bool = False
    scale: float = 1.0
    freqs: mx.array | None = None

    def __call__(self, layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
        """Re-bases keys, in float32.

        Args:
            layer: the layer of the keys; unused.
            keys: (1, n_kv_heads, m, head_dim).
            offsets: (m,) int32, added to the positions.

        Returns:
            Keys of the same shape and dtype.
        """
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
        """Returns the shift for an MLX RoPE module, verified against the output of the module.

        Supports `mlx.nn.RoPE` and modules with their frequencies in `_freqs`.

        Raises:
            NotSupportedError: the module is not supported, or its rotation depends on the length, as
                with dynamic NTK.
        """
        name = type(module).__name__
        dims = getattr(module, "dims", getattr(module, "dim", None))
        if not isinstance(dims, int):
            raise NotSupportedError(
                f"cannot read {name}: its dims, the number of rotated features, is missing"
            )
        freqs = getattr(module, "_freqs", None)
        base, scale = getattr(module, "base", None), getattr(module, "scale", 1.0)
        if freqs is not None:
            base, scale = None, 1.0
        elif base is None:
            raise NotSupportedError(f"cannot read {name}: it has neither _freqs nor base")
        shift = cls(dims, base, bool(getattr(module, "traditional", False)), scale, freqs)
        longest = getattr(module, "max_position_embeddings", None) or 0
        for distance in (5, longest + 7):
            if not shift._explains(module, distance):
                raise NotSupportedError(
                    f"{name}({dims}): its rotation does not depend on the difference of positions alone, "
                    "so stored keys cannot be re-based exactly"
                )
        return shift

    def _explains(self, module: nn.Module, distance: int) -> bool:
        """Whether this shift turns the module's output at offset 0 into that at `distance`."""
        x = mx.random.normal((1, 1, 3, self.dims), key=mx.random.key(0))
        near, far = module(x, offset=0), module(x, offset=distance)
        error = mx.abs(self(0, near, mx.full((3,), distance, mx.int32)) - far).max()
        # Angles in float32 have an error of about distance * 2**-24.
        return bool((error <= 1e-4 + distance * 1e-6).item())


rope_shift = RopeShift
