"""What all layers have in common: they belong to rows, and pass on what they are told."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx

from ...arguments import class_of
from ...errors import CacheError
from ..forward.rows import Rows
from ..hosts.layout import Leaf
from ..hosts.observe import Observable

Self = TypeVar("Self", bound="Layer")


class Layer(Observable):
    """One leaf of a cache list. Has neither a length nor a truth value, as mlx-lm tests that.

    Args:
        rows: what it shares with the other layers of its list.
        leaf: which one it is.
    """

    rows: Rows

    def __init__(self, rows: Rows, leaf: Leaf) -> None:
        self.rows = rows
        self.leaf = leaf

    def served_by(self: Self, rows: Rows) -> Self:
        """The same layer of other rows."""
        return type(self)(rows, self.leaf)

    @property
    def offset(self) -> Any:
        """Where the model's RoPE goes on, an int or an array (B,). After removals it runs ahead of tokens."""
        return self.rows.offset(self.leaf.index)

    def size(self) -> int:
        return max(self.rows.positions, default=0)

    def empty(self) -> bool:
        return self.size() == 0

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every layer; the first that is asked does it for all.

        Returns:
            How many were dropped: fewer than n where there are fewer.

        Raises:
            NotSupportedError: what the tokens before those need is not held; nothing has changed.
            CacheError: layers are told different numbers.
        """
        return self.rows.edits.tell(self.leaf.index, "trim", n, lambda: self.rows.trim(n))

    def prepare(
        self,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the next inputs, a number for each row. Raises ValueError for other numbers."""
        # As ints, which can be compared with what other layers are told.
        told = tuple(
            numbers if numbers is None else [operator.index(number) for number in _listed(numbers)]
            for numbers in (left_padding, lengths, right_padding)
        )
        self.rows.edits.tell(self.leaf.index, "prepare", told, lambda: self.rows.prepare(*told))

    def finalize(self) -> None:
        """What comes next is not padded on the right."""
        self.rows.edits.tell(self.leaf.index, "finalize", None, self.rows.finalize)

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep just these rows, in this order."""
        keep = _listed(batch_indices)
        self.rows.edits.tell(self.leaf.index, "filter", keep, lambda: self.rows.filter(keep))

    def extend(self, other: Layer) -> None:
        """Take another batch's rows behind these, as forks.

        Raises:
            ValueError: one of another pool.
            TypeError: one of another package, such as mlx-lm's own.
        """
        check_ours(other)
        told = weakref.ref(other.rows)
        self.rows.edits.tell(self.leaf.index, "extend", told, lambda: self.rows.extend(other.rows))

    def extract(self: Self, idx: int) -> Self:
        """This layer of a fork of one row."""
        rows = self.rows.copies.tell(self.leaf.index, "extract", idx, lambda: self.rows.extracted(idx))
        return self.served_by(rows)

    def merge(self: Self, caches: Sequence[Layer]) -> Self:
        """This layer of a batch of forks of these. Raises as `extend`."""
        for cache in caches:
            check_ours(cache)
        all_rows = [cache.rows for cache in caches]
        told = [weakref.ref(rows) for rows in all_rows]
        rows = self.rows.copies.tell(self.leaf.index, "merge", told, lambda: self.rows.merged(all_rows))
        return self.served_by(rows)

    def __repr__(self) -> str:
        try:
            counts = ", ".join(map(str, self.rows.positions)) or "no"
            held = f"rows of {counts} tokens" if self.rows.is_batch else f"{counts} tokens"
        except CacheError:
            held = "closed"
        return f"{type(self).__name__}(layer {self.leaf.name}, {held})"

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """The same layer of a fork; all layers that are copied together belong to one."""
        rows = memo.get(id(self.rows))
        if rows is None:
            rows = memo[id(self.rows)] = self.rows.fork()
        return self.served_by(rows)


def check_ours(entry: Any, kind: type[Observable] = Layer) -> None:
    """Raise TypeError unless this is an entry of a cache list of this package's, of this kind."""
    if not isinstance(entry, kind):
        raise TypeError(
            f"only {kind.__name__} of this package's caches can join a batch of them, got {class_of(entry)}; "
            "make it by make_prompt_cache, or attach the model"
        )


def _listed(numbers: Sequence[int] | mx.array) -> list[int]:
    """Numbers of rows, as mlx-lm's tools give them."""
    listed: Any = numbers.tolist() if isinstance(numbers, mx.array) else numbers
    return list(listed)
