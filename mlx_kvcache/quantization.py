"""Which keys and values are stored in fewer bits, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .arguments import whole

WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bits that an element may have."""
GROUP_SIZES = (32, 64, 128)
"""Neighboring features that may share a scale and a bias."""

Bits = int | None | tuple[int | None, int | None]
"""Of keys and values alike, or of each; None stands for float."""


class Codec(NamedTuple):
    """MLX's affine quantization: each group of features has a scale and a bias of 16 bits."""

    bits: int
    group_size: int


Codecs = tuple[Codec | None, Codec | None]
"""Of keys and of values; None where they stay in float."""


@dataclass(frozen=True)
class Quantization:
    """What `init` is given to store keys and values in fewer bits.

    Args:
        bits: 8, 6, 5, 4, 3 or 2; a pair for keys and values, in which None keeps one in float;
            None for float; or a function of the layer that returns one of these.
        group_size: 32, 64 or 128 features share a scale and a bias. Head sizes must be multiples
            of it.
        after: a sequence stays in float until it is longer than this.

    Raises:
        ValueError: bits or a group size that MLX does not have, or a negative length.
    """

    bits: Bits | Callable[[int], Bits] = 8
    group_size: int = 64
    after: int = 0

    def __post_init__(self) -> None:
        checked_codec(WIDTHS[0], self.group_size)
        whole(after=self.after)
        if not callable(self.bits):
            self._codecs(self.bits)

    def of(self, layer: int) -> Codecs:
        """How a layer's keys and values are stored. Raises ValueError for bits that MLX does not have."""
        return self._codecs(self.bits(layer) if callable(self.bits) else self.bits)

    def check(self, head_dim: int) -> None:
        """Raise ValueError unless groups divide heads of this size."""
        check_width("heads", head_dim, self.group_size)

    def _codecs(self, bits: Bits) -> Codecs:
        if isinstance(bits, tuple) and len(bits) != 2:
            raise ValueError(f"bits of keys and of values are two numbers, got {bits}")
        keys, values = bits if isinstance(bits, tuple) else (bits, bits)
        return self._codec(keys), self._codec(values)

    def _codec(self, bits: int | None) -> Codec | None:
        return None if bits is None else checked_codec(bits, self.group_size)


def checked_codec(bits: int, group_size: int) -> Codec:
    """A codec. Raises ValueError for numbers that MLX does not have."""
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"keys or values in {bits!r} bits: there are {WIDTHS}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"a group size of {group_size!r}: there are {GROUP_SIZES}")
    return Codec(bits, group_size)


def check_width(what: str, width: int, group_size: int) -> None:
    """Raise ValueError unless groups divide a head's features."""
    if width % group_size:
        fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
        hint = f"groups of {' or '.join(fitting)} do" if fitting else "no group size does"
        raise ValueError(f"{what} have {width} features, which groups of {group_size} do not divide; {hint}")
