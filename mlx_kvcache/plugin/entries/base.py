"""The base class of all layers of a cache list: passes edits on to the rows behind the list."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx

from ...arguments import class_of
from ...errors import CacheError
from ..forward.batch_rows import Rows
from ..hosts.layout import Leaf
from ..hosts.observe import Observable

Self = TypeVar("Self", bound="Layer")


class Layer(Observable):
    """One layer of a cache list. Defines neither `__len__` nor `__bool__`, because mlx-lm tests truth values.

    Args:
        rows: the rows that all layers of the list share.
        leaf: the layer's place in the list.
    """

    rows: Rows

    def __new__(cls, *args: Any) -> Any:
        # A host's own would set attributes that are properties here.
        return object.__new__(cls)

    def __init__(self, rows: Rows, leaf: Leaf) -> None:
        self.rows = rows
        self.leaf = leaf

    def served_by(self: Self, rows: Rows) -> Self:
        """The same layer for other rows."""
        return type(self)(rows, self.leaf)

    @property
    def saved_state(self) -> Any:
        """The state in the form of mlx-lm 0.32's class of this name; for a batch, a list of its arrays."""
        raise NotImplementedError

    @property
    def state(self) -> Any:
        """The state in the form of the host's class of this name; for a batch, a list of its arrays."""
        return self.rows.pool.host.state(type(self).__name__, self.saved_state)

    @property
    def offset(self) -> Any:
        """The RoPE offset of the next token: an int, or an array (B,). Larger than `size` after removals."""
        # Decoding reads this twice for every layer and token.
        rows, index = self.rows, self.leaf.index
        offsets, forward = rows.offsets, rows.forward
        if offsets is None or index not in rows.pool.forms:
            return rows.offset(index)
        return offsets[forward is not None and forward.written[index]]

    def size(self) -> int:
        return max(self.rows.positions, default=0)

    def empty(self) -> bool:
        return self.size() == 0

    def trim(self, n: int) -> int:
        """Drop the newest n tokens. The first layer that is called drops them for all layers.

        Returns:
            The number of dropped tokens: fewer than n if there are fewer.

        Raises:
            NotSupportedError: the cache cannot be resumed at the earlier position; nothing has changed.
            CacheError: layers are told different numbers.
        """
        return self.rows.edits.tell(self.leaf.index, "trim", n, lambda: self.rows.trim(n))

    def prepare(
        self,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the next inputs, one number for each row.

        Args:
            left_padding: padding columns that come first.
            lengths: the number of tokens that follow, over all inputs until `finalize`.
            right_padding: padding columns at the end of the next input. Ignored if `lengths` is given.

        Raises:
            ValueError: there is not one number for each row, or one is negative.
            CacheError: layers are told different numbers.
        """
        # Plain ints, so that they can be compared with those of other layers.
        told = tuple(
            numbers if numbers is None else [operator.index(number) for number in _listed(numbers)]
            for numbers in (left_padding, lengths, right_padding)
        )
        self.rows.edits.tell(self.leaf.index, "prepare", told, lambda: self.rows.prepare(*told))

    def finalize(self) -> None:
        """End the announced padding on the right."""
        self.rows.edits.tell(self.leaf.index, "finalize", None, self.rows.finalize)

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep only these rows, in this order."""
        keep = _listed(batch_indices)
        self.rows.edits.tell(self.leaf.index, "filter", keep, lambda: self.rows.filter(keep))

    def extend(self, other: Layer) -> None:
        """Append forks of another batch's rows.

        Raises:
            ValueError: the other batch is in another pool.
            TypeError: the other entry is not of this package.
        """
        check_ours(other)
        told = weakref.ref(other.rows)
        self.rows.edits.tell(self.leaf.index, "extend", told, lambda: self.rows.extend(other.rows))

    def extract(self: Self, idx: int) -> Self:
        """This layer for a fork of one row."""
        rows = self.rows.copies.tell(self.leaf.index, "extract", idx, lambda: self.rows.extracted(idx))
        return self.served_by(rows)

    def merge(self: Self, caches: Sequence[Layer]) -> Self:
        """This layer for a batch of forks of these caches' rows. Raises as `extend`."""
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
        """The same layer for a fork. All layers that are copied together share one fork."""
        rows = memo.get(id(self.rows))
        if rows is None:
            rows = memo[id(self.rows)] = self.rows.fork()
        return self.served_by(rows)


def check_ours(entry: Any, kind: type[Observable] = Layer) -> None:
    """Raise TypeError unless this is an entry of this package and of this kind."""
    if not isinstance(entry, kind):
        raise TypeError(
            f"only an mlx_kvcache {kind.__name__} can join a batch here, got {class_of(entry)}; "
            "make the cache by make_prompt_cache, or attach the model"
        )


def _listed(numbers: Sequence[int] | mx.array) -> list[int]:
    """A list of numbers, which mlx-lm may give as an array."""
    listed: Any = numbers.tolist() if isinstance(numbers, mx.array) else numbers
    return list(listed)
