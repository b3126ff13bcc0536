"""The quantization of stored keys and values: bit widths, group size and transform, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from .arguments import whole

WIDTHS = (8, 6, 5, 4, 3, 2)
"""The supported bit widths."""
GROUP_SIZES = (32, 64, 128)
"""The supported numbers of consecutive features that share a scale and a bias."""

Bits = int | None | tuple[int | None, int | None]
"""One width for keys and values, or a pair (keys, values). None means float."""

Transform = Literal["hadamard", "none"]
"""What is done to a token's features before they are quantized.

"hadamard" multiplies them by a Hadamard matrix, which spreads a few large features over all of them.
"""
TRANSFORMED = 8
"""Codecs of fewer bits than this have the transform. With more, rounding hardly changes a model's output."""


class Codec(NamedTuple):
    """MLX's affine quantization, with a 16-bit scale and a 16-bit bias for each group of features."""

    bits: int
    group_size: int
    transform: Transform = "none"

    def plain(self) -> Codec:
        """Returns the codec without the transform."""
        return self._replace(transform="none")


Codecs = tuple[Codec | None, Codec | None]
"""The codecs of keys and of values. None means float."""


@dataclass(frozen=True)
class Quantization:
    """How a cache quantizes keys and values. Pass it to `init`.

    Args:
        bits: 8, 6, 5, 4, 3 or 2; or None for float; or a pair of these (keys, values);
            or a function that takes a layer and returns any of these.
        group_size: the number of features that share a scale and a bias: 32, 64 or 128. It must divide
            `head_dim`.
        after: a sequence stays in float up to this number of tokens.
        transform: "hadamard" transforms keys and values of fewer than 8 bits, which lowers the loss; "none"
            quantizes them as they are. Latents, which models with multi-head latent attention store, are
            never transformed.

    Raises:
        ValueError: unsupported bits, group size or transform, or a negative `after`.
    """

    bits: Bits | Callable[[int], Bits] = 8
    group_size: int = 64
    after: int = 0
    transform: Transform = "hadamard"

    def __post_init__(self) -> None:
        checked_codec(WIDTHS[0], self.group_size, self.transform)
        whole(after=self.after)
        if not callable(self.bits):
            codecs = self._codecs(self.bits)
            if all(codec is None or codec.transform == "none" for codec in codecs):
                # So that it equals what stores the same.
                object.__setattr__(self, "transform", "none")

    def of(self, layer: int) -> Codecs:
        """Returns the codecs of a layer. Raises ValueError for unsupported bits."""
        return self._codecs(self.bits(layer) if callable(self.bits) else self.bits)

    def check(self, head_dim: int) -> None:
        """Raises ValueError if `head_dim` is not a multiple of the group size."""
        check_head_dim(head_dim, self.group_size)

    def _codecs(self, bits: Bits) -> Codecs:
        if isinstance(bits, tuple) and len(bits) != 2:
            raise ValueError(f"bits must be one width or a pair (keys, values), got {bits}")
        keys, values = (
            None if width is None else self._codec(width)
            for width in (bits if isinstance(bits, tuple) else (bits, bits))
        )
        return keys, values

    def _codec(self, width: int) -> Codec:
        codec = checked_codec(width, self.group_size, self.transform)
        return codec if width < TRANSFORMED else codec.plain()


def checked_codec(bits: int, group_size: int, transform: Transform = "none") -> Codec:
    """Returns a codec. Raises ValueError for unsupported bits, group size or transform."""
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"cannot quantize to {bits!r} bits; supported: {WIDTHS}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size!r} is not supported; supported: {GROUP_SIZES}")
    if transform not in get_args(Transform):
        raise ValueError(f"transform {transform!r} is not supported; supported: {get_args(Transform)}")
    return Codec(bits, group_size, transform)


def check_head_dim(head_dim: int, group_size: int, which: str = "") -> None:
    """Raises ValueError if a head's features do not divide into groups; `which` says whose they are."""
    if head_dim % group_size:
        fitting = [str(size) for size in GROUP_SIZES if head_dim % size == 0]
        hint = f"use {' or '.join(fitting)}" if fitting else "no supported group size divides it"
        owner = f" of {which}" if which else ""
        raise ValueError(f"head_dim {head_dim}{owner} is not a multiple of group_size {group_size}; {hint}")
