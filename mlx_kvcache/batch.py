"""The input of a forward pass: its tokens, exceptions from causality, and the format of the history."""

from __future__ import annotations

import operator
from collections import Counter
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


def _check_inside(what: str, indices: tuple[int, ...], n: int) -> None:
    for index in indices:
        if index >= n:
            raise ValueError(f"{what} index {index} is out of range for a batch of {n} tokens")


@dataclass(frozen=True, init=False)
class Batch:
    """The tokens of one forward pass, in any order and from any number of sequences.

    Args:
        positions: the position of each token in its sequence.
        sequences: the sequence of each token, any integer from 0 on.
        multimodal: the batch indices of tokens that carry an encoder's input.

    Raises:
        ValueError: no tokens, unequal lengths, a negative number, a duplicate
            (sequence, position), or a multimodal index out of range.
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
            raise ValueError(f"a batch needs a sequence per position, got {n} and {len(self.sequences)}")
        if n > 1 and len(set(zip(self.sequences, self.positions, strict=True))) != n:
            pairs = Counter(zip(self.sequences, self.positions, strict=True))
            [((sequence, position), _)] = pairs.most_common(1)
            raise ValueError(f"a batch has position {position} of sequence {sequence} twice")
        _check_inside("multimodal", self.multimodal, n)

    @classmethod
    def run(cls, sequence: int, begin: int, n: int) -> Batch:
        """Returns a batch of n consecutive tokens of one sequence.

        Args:
            sequence: the sequence.
            begin: the position of the first token.
            n: the number of tokens.

        Raises:
            ValueError: a negative sequence or position, or less than 1 token.
        """
        sequence, begin, n = (int(operator.index(number)) for number in (sequence, begin, n))
        if sequence < 0 or begin < 0 or n < 1:
            raise ValueError(
                "a run needs a sequence and a position of 0 or more and at least 1 token, got "
                f"{n} tokens of sequence {sequence} from position {begin} on"
            )
        batch = object.__new__(cls)
        # These fields are valid by construction, so `__init__` need not check each token.
        batch.__dict__.update(
            positions=tuple(range(begin, begin + n)),
            sequences=(sequence,) * n,
            multimodal=(),
            rows=MappingProxyType({sequence: tuple(range(n))}),
        )
        return batch

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def rows(self) -> MappingProxyType[int, tuple[int, ...]]:
        """The batch indices of each sequence by rising position; sequences in order of appearance."""
        found: dict[int, list[int]] = {}
        for index, sequence in enumerate(self.sequences):
            found.setdefault(sequence, []).append(index)
        return MappingProxyType(
            {name: tuple(sorted(rows, key=self.positions.__getitem__)) for name, rows in found.items()}
        )

    def check_continues(self, end_of: Callable[[int], int]) -> None:
        """Checks that the positions continue each sequence without gaps.

        Args:
            end_of: returns the position after the last token of a sequence.

        Raises:
            ValueError: the positions of a sequence do not start at its end, or have a gap.
        """
        for sequence, rows in self.rows.items():
            end = end_of(sequence)
            first, last = self.positions[rows[0]], self.positions[rows[-1]]
            if first != end or last != end + len(rows) - 1:
                raise ValueError(
                    f"sequence {sequence} ends at {end}, so its next {len(rows)} tokens need positions "
                    f"{end} to {end + len(rows) - 1}, got {first} to {last}"
                )


@dataclass(frozen=True, init=False)
class CausalOptions:
    """Exceptions from causality.

    Args:
        except_: the batch indices of tokens that also see later tokens of their own
            sequence, as the tokens of an image do.

    Raises:
        ValueError: a negative index.
    """

    except_: tuple[int, ...] = ()

    def __init__(self, except_: Iterable[int] = ()) -> None:
        self.__dict__["except_"] = _whole("except_", except_)

    def check(self, n: int) -> None:
        """Raises ValueError if an index is out of range for a batch of n tokens."""
        _check_inside("except_", self.except_, n)


@dataclass(frozen=True)
class CacheConfig:
    """The format in which `get` returns the history.

    Args:
        mask_dtype: None for boolean masks (True = visible). A float dtype for additive masks
            (0 = visible, -inf = hidden); `get` then always returns an array.
        padding: `get` rounds the number of keys up to a multiple of this. Padding is zeros, and masked.

    Raises:
        ValueError: `mask_dtype` is not a float type, or `padding` is below 1 or above 2**31 - 1.
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
