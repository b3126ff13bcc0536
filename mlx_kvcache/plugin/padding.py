"""Which columns of the coming inputs are padding, as mlx-lm's `prepare` announces it."""

from __future__ import annotations

from collections.abc import Sequence

Columns = tuple[int, int]
"""The columns [first, stop) of a row that are tokens; the others are padding."""


class Padding:
    """For each row: padding to come on the left, then tokens, then padding until `finalize`."""

    def __init__(self, rows: int) -> None:
        self.left = [0] * rows
        self.lengths: list[int] | None = None
        self._right: list[int] | None = None

    @property
    def is_announced(self) -> bool:
        """Whether any padding is to come."""
        return any(self.left) or self.lengths is not None or self._right is not None

    def prepare(
        self, left: Sequence[int] | None, lengths: Sequence[int] | None, right: Sequence[int] | None
    ) -> None:
        """Announce padding of the next inputs.

        Args:
            left: columns of padding to come first.
            lengths: tokens that follow, over all inputs until `finalize`.
            right: where `lengths` is not given, columns of padding at the end of the next input.

        Raises:
            ValueError: not one number for each row, or a negative one.
        """
        for name, numbers in (("left_padding", left), ("lengths", lengths), ("right_padding", right)):
            if numbers is not None and (len(numbers) != len(self.left) or min(numbers) < 0):
                raise ValueError(f"{name}={list(numbers)}: {len(self.left)} numbers of 0 or more are needed")
        if left is not None:
            self.left = [old + new for old, new in zip(self.left, left, strict=True)]
        if lengths is not None:
            self.lengths = list(lengths)
        elif right is not None:
            self._right = list(right)

    def finalize(self) -> None:
        """What comes next is not padded on the right."""
        self.lengths = self._right = None

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

    def passed(self, columns: Sequence[Columns]) -> None:
        """These columns have been computed."""
        if not self.is_announced:
            return
        self.left = [left - first for left, (first, _) in zip(self.left, columns, strict=True)]
        tokens = [stop - first for first, stop in columns]
        if self.lengths is not None:
            self.lengths = [rest - done for rest, done in zip(self.lengths, tokens, strict=True)]
        elif self._right is not None:
            self.lengths = [0] * len(tokens)

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
