"""Which columns of the coming inputs are padding, as mlx-lm's `prepare` announces it."""

from __future__ import annotations

from collections.abc import Sequence

Columns = tuple[int, int]
"""The columns [first, stop) of a row that are tokens; the others are padding."""


class Padding:
    """For each row: padding to come on the left, then tokens, then padding until `finalized`.

    It does not change: what happens makes another.
    """

    def __init__(self, rows: int) -> None:
        self.left = [0] * rows
        self.lengths: list[int] | None = None
        self._right: list[int] | None = None

    @property
    def is_announced(self) -> bool:
        """Whether any padding is to come."""
        return any(self.left) or self.lengths is not None or self._right is not None

    def prepared(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> Padding:
        """The same with more padding announced.

        Args:
            left: columns of padding to come first.
            lengths: tokens that follow, over all inputs until `finalized`.
            right: where `lengths` is not given, columns of padding at the end of the next input.

        Raises:
            ValueError: not one number for each row, or a negative one.
        """
        for name, numbers in (("left_padding", left), ("lengths", lengths), ("right_padding", right)):
            if numbers is not None and (len(numbers) != len(self.left) or min(numbers) < 0):
                raise ValueError(f"{name}={list(numbers)}: {len(self.left)} numbers of 0 or more are needed")
        other = self._copy()
        if left is not None:
            other.left = [old + new for old, new in zip(self.left, left, strict=True)]
        if lengths is not None:
            other.lengths = list(lengths)
        elif right is not None:
            other._right = list(right)
        return other

    def finalized(self) -> Padding:
        """The same where what comes next is not padded on the right."""
        other = Padding(0)
        other.left = self.left
        return other

    def columns(self, n: int) -> list[Columns]:
        """Which of the next n columns are tokens, for each row."""
        result = []
        for row, left in enumerate(self.left):
            first = min(left, n)
            stop = n
            if self.lengths is not None:
                stop = min(n, first + self.lengths[row])
            elif self._right is not None:
                stop = max(first, n - self._right[row])
            result.append((first, stop))
        return result

    def passed(self, columns: Sequence[Columns]) -> Padding:
        """What is still to come after these columns have been computed."""
        if not self.is_announced:
            return self
        other = self._copy()
        other.left = [left - first for left, (first, _) in zip(self.left, columns, strict=True)]
        tokens = [stop - first for first, stop in columns]
        if self.lengths is not None:
            other.lengths = [rest - done for rest, done in zip(self.lengths, tokens, strict=True)]
        elif self._right is not None:
            other.lengths = [0] * len(tokens)
        return other

    def _copy(self) -> Padding:
        return self.filtered(range(len(self.left)))

    def filtered(self, keep: Sequence[int]) -> Padding:
        """The same for some of the rows."""
        chosen = Padding(0)
        chosen.left = [self.left[row] for row in keep]
        chosen.lengths = None if self.lengths is None else [self.lengths[row] for row in keep]
        chosen._right = None if self._right is None else [self._right[row] for row in keep]
        return chosen

    def extended(self, other: Padding) -> Padding:
        """The same with another's rows after these; padding on the right is announced anew after that."""
        joined = Padding(0)
        joined.left = self.left + other.left
        return joined
