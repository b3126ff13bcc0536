"""The quantization of stored keys and values: bit widths, group size and transform, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

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
RECENT = 16
"""How many of the newest tokens are also held in float if a codec has fewer bits than `TRANSFORMED`."""
CENTERED = 512
"""The largest number of features of a head that can have a center."""

Centers = tuple[tuple[int, bytes, bytes], ...]
"""Layers with the centers of their keys and values, as a `Codec` has them. Compares by value."""
Means = Mapping[int, tuple[Any, Any]]
"""The mean key and the mean value of each head, by layer: two arrays (n_kv_heads, head_dim)."""


class Codec(NamedTuple):
    """MLX's affine quantization, with a 16-bit scale and a 16-bit bias for each group of features.

    The center, if there is one, has the direction of each head's mean, (heads, head_dim) in float16. The
    transform turns it into features that are all equal. The biases take these up, so how far a token lies
    in this direction does not widen the range that the bits divide.
    """

    bits: int
    group_size: int
    transform: Transform = "none"
    center: bytes = b""

    def plain(self) -> Codec:
        """Returns the codec without the transform."""
        return self._replace(transform="none", center=b"")

    def centered(self, center: bytes) -> Codec:
        """Returns the codec with a center, or as it is if it has no transform."""
        return self if self.transform == "none" else self._replace(center=center)

    def check(self, heads: int, head_dim: int, which: str = "") -> None:
        """Raises ValueError if these heads do not fit the group size or the center; `which` names them."""
        check_head_dim(head_dim, self.group_size, which)
        if self.center and len(self.center) != heads * head_dim * np.float16().nbytes:
            owner = f" of {which}" if which else ""
            raise ValueError(
                f"the center{owner} has {len(self.center)} bytes, expected 2 for each of {heads} heads of "
                f"{head_dim} features"
            )
        if self.center and head_dim > CENTERED:
            raise ValueError(f"head_dim {head_dim} is too large for a center, which has at most {CENTERED}")


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
        centers: for some layers, the mean key and the mean value of each head, two arrays (n_kv_heads,
            head_dim), measured on any text. The transform then also removes what all tokens have in common,
            which lowers the loss further. Only the directions of the means matter.
        recent: how many of a sequence's newest tokens have a copy in float, which is read instead; always 0
            if no width is below 8. Attention usually weighs these tokens most. The tokens of a forward pass
            see each other in float, too, so outputs depend on how a text is divided into passes. A fork or a
            removal may drop copies.

    Raises:
        ValueError: unsupported bits, group size or transform, a negative `after` or `recent`, or centers
            that are not finite numbers.
    """

    bits: Bits | Callable[[int], Bits] = 8
    group_size: int = 64
    after: int = 0
    transform: Transform = "hadamard"
    centers: Means | Centers = ()
    recent: int = RECENT

    def __post_init__(self) -> None:
        checked_codec(WIDTHS[0], self.group_size, self.transform)
        whole(after=self.after, recent=self.recent)
        if isinstance(self.centers, Mapping):
            object.__setattr__(self, "centers", centers_of(self.centers))
        if not callable(self.bits):
            # So that it equals what stores the same.
            for name, value in unused(self._codecs(self.bits)).items():
                object.__setattr__(self, name, value)

    def of(self, layer: int) -> Codecs:
        """Returns the codecs of a layer. Raises ValueError for unsupported bits."""
        keys, values = self._codecs(self.bits(layer) if callable(self.bits) else self.bits)
        assert isinstance(self.centers, tuple)
        for own, key_center, value_center in self.centers:
            if own == layer:
                keys, values = keys and keys.centered(key_center), values and values.centered(value_center)
        return keys, values

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


def unused(codecs: Iterable[Codec | None]) -> dict[str, Any]:
    """Returns the simplest value of each field of a `Quantization` that has no effect on these codecs."""
    present = [codec for codec in codecs if codec]
    fields: dict[str, Any] = {}
    if all(codec.transform == "none" for codec in present):
        fields |= {"transform": "none", "centers": ()}
    if all(codec.bits >= TRANSFORMED for codec in present):
        fields |= {"recent": 0}
    return fields


def checked_codec(bits: int, group_size: int, transform: Transform = "none", center: bytes = b"") -> Codec:
    """Returns a codec. Raises ValueError for unsupported bits, group size, transform or center."""
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"cannot quantize to {bits!r} bits; supported: {WIDTHS}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size!r} is not supported; supported: {GROUP_SIZES}")
    if transform not in get_args(Transform):
        raise ValueError(f"transform {transform!r} is not supported; supported: {get_args(Transform)}")
    if center and transform == "none":
        raise ValueError("a codec without a transform has a center")
    if not np.isfinite(np.frombuffer(center, np.float16)).all():
        raise ValueError("the center of a codec has numbers that are not finite")
    return Codec(bits, group_size, transform, center)


def centers_of(means: Means) -> Centers:
    """Returns the centers of layers. Raises ValueError if one is no array of finite numbers of this form."""
    return tuple(
        (layer, _direction(layer, keys), _direction(layer, values))
        for layer, (keys, values) in sorted(means.items())
    )


def _direction(layer: int, mean: Any) -> bytes:
    rows = np.array(mean, np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"layer {layer} has a center {rows.shape}, expected (n_kv_heads, head_dim) finite numbers"
        )
    # Without the length, rounding to 16 bits neither overflows nor depends on the model's scale.
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(lengths, lengths, 1)).astype(np.float16).tobytes()


def check_head_dim(head_dim: int, group_size: int, which: str = "") -> None:
    """Raises ValueError if a head's features do not divide into groups; `which` says whose they are."""
    if head_dim % group_size:
        fitting = [str(size) for size in GROUP_SIZES if head_dim % size == 0]
        hint = f"use {' or '.join(fitting)}" if fitting else "no supported group size divides it"
        owner = f" of {which}" if which else ""
        raise ValueError(f"head_dim {head_dim}{owner} is not a multiple of group_size {group_size}; {hint}")
