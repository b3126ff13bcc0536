"""What goes into a forward pass: which tokens, and how their output is to look."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import mlx.core as mx

from .arguments import EXTENT, whole


def _whole(name: str, numbers: Iterable[int]) -> tuple[int, ...]:
    values = tuple(int(operator.index(number)) for number in numbers)
    for index, value in enumerate(values):
        if value < 0:
            raise ValueError(f"{name}[{index}] is {value}; it must be 0 or more")
    return values


@dataclass(frozen=True, init=False)
class Batch:
    """The tokens of one forward pass, in any order and of any sequences.

    Args:
        positions: each token's index in its sequence.
        sequences: each token's sequence, any int >= 0.
        multimodal: batch indices of tokens that carry an encoder's input.

    Raises:
        ValueError: no tokens, unequal lengths, a negative number, the same
            (sequence, position) twice, or a multimodal index out of range.
    """

    positions: tuple[int, ...]
    sequences: tuple[int, ...]
    multimodal: tuple[int, ...] = ()

    def __init__(
        self, positions: Iterable[int], sequences: Iterable[int], multimodal: Iterable[int] = ()
    ) -> None:
        self.__dict__.update(
            positions=_whole("positions", positions),
            sequences=_whole("sequences", sequences),
            multimodal=_whole("multimodal", multimodal),
        )
        n = len(self.positions)
        if n == 0:
            raise ValueError("a batch needs at least 1 token, got 0 positions")
        if n != len(self.sequences):
            raise ValueError(f"{n} positions but {len(self.sequences)} sequences")
        if n > 1 and len(set(zip(self.sequences, self.positions, strict=True))) != n:
            raise ValueError(f"a (sequence, position) comes twice: {self._first_twice()}")
        for index in self.multimodal:
            if index >= n:
                raise ValueError(f"multimodal index {index} in a batch of {n} tokens")

    @classmethod
    def run(cls, sequence: int, begin: int, n: int) -> Batch:
        """The n tokens of one sequence from position `begin` on. Raises ValueError as Batch()."""
        sequence, begin, n = (int(operator.index(number)) for number in (sequence, begin, n))
        if sequence < 0 or begin < 0 or n < 1:
            raise ValueError(f"no run of {n} tokens of sequence {sequence} from position {begin} on")
        batch = object.__new__(cls)
        # What follows holds by construction, so it need not be validated token by token.
        fields = batch.__dict__
        fields["positions"] = tuple(range(begin, begin + n))
        fields["sequences"] = (sequence,) * n
        fields["multimodal"] = ()
        fields["rows"] = MappingProxyType({sequence: tuple(range(n))})
        return batch

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def rows(self) -> MappingProxyType[int, tuple[int, ...]]:
        """For each sequence, in order of appearance: its batch indices by rising position."""
        found: dict[int, list[int]] = {}
        for index, sequence in enumerate(self.sequences):
            found.setdefault(sequence, []).append(index)
        by_position = self.positions.__getitem__
        return MappingProxyType(
            {sequence: tuple(sorted(rows, key=by_position)) for sequence, rows in found.items()}
        )

    def check_continues(self, end_of: Callable[[int], int]) -> None:
        """Raise ValueError unless each sequence's positions go on where `end_of` says that it ends."""
        for sequence, rows in self.rows.items():
            end = end_of(sequence)
            first, last = self.positions[rows[0]], self.positions[rows[-1]]
            if first != end or last != end + len(rows) - 1:
                raise ValueError(
                    f"sequence {sequence} ends at {end}, so {len(rows)} tokens continue it at positions "
                    f"{end} to {end + len(rows) - 1}, not {first} to {last}"
                )

    def _first_twice(self) -> tuple[int, int]:
        seen: set[tuple[int, int]] = set()
        for pair in zip(self.sequences, self.positions, strict=True):
            if pair in seen:
                return pair
            seen.add(pair)
        raise AssertionError("called only when a pair comes twice")


@dataclass(frozen=True, init=False)
class CausalOptions:
    """Exceptions from causality.

    Args:
        except_: batch indices of tokens that also see later tokens of their own
            sequence, as the tokens of an image do.
    """

    except_: tuple[int, ...] = ()

    def __init__(self, except_: Iterable[int] = ()) -> None:
        self.__dict__["except_"] = _whole("except_", except_)

    def check(self, n: int) -> None:
        """Raise ValueError unless all indices lie in a batch of n tokens."""
        for index in self.except_:
            if index >= n:
                raise ValueError(f"except_ names batch index {index} in a batch of {n} tokens")


@dataclass(frozen=True)
class CacheConfig:
    """The form in which `get` returns history.

    Args:
        mask_dtype: None for boolean masks (True = visible); a float dtype for additive
            ones (0 = visible, -inf = hidden), which are then always arrays.
        padding: the history length is rounded up to a multiple of this; padded cells
            are zeros and masked.

    Raises:
        ValueError: a mask_dtype that is no float type, or a padding below 1 or above 2**31 - 1.
    """

    mask_dtype: mx.Dtype | None = None
    padding: int = 1

    def __post_init__(self) -> None:
        if self.mask_dtype is not None and not mx.issubdtype(self.mask_dtype, mx.floating):
            raise ValueError(f"mask_dtype must be a float type, got {self.mask_dtype}")
        (padding,) = whole(1, padding=self.padding)
        if padding > EXTENT:
            raise ValueError(f"padding must be {EXTENT} or less, got {padding}")
        object.__setattr__(self, "padding", padding)
