"""A pass in which every token is a row of the model's input, so that sequences need not be alike.

A prompt's block and other sequences' single tokens go through the model together, as (tokens, 1)
with an offset for each. Only attention asks which rows belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..batch import Batch
from ..caches.attend import attend
from ..caches.keyvalue import Attending
from ..errors import NotSupportedError
from .conversation import Conversation
from .forward import Forward, narrowed
from .layout import Leaf
from .padding import Columns
from .pool import Pool
from .ragged import Ragged, RaggedMask
from .rows import Rows


class TokenForward(Forward):
    """The tokens of all sequences, one after the other, each as a row."""

    def update(self, leaf: Leaf, keys: mx.array, values: mx.array) -> Any:
        self.step(leaf).put(leaf.index, keys.swapaxes(0, 2), values.swapaxes(0, 2))
        return self.history(leaf)

    def history(self, leaf: Leaf) -> Any:
        handle = Ragged(self, leaf)
        return handle, handle

    def mask(self, leaf: Leaf, return_array: bool, window_size: int | None) -> Any:
        is_own = narrowed(leaf.rule, window_size) == leaf.rule
        return None if is_own and not return_array else RaggedMask(leaf, window_size)

    def attend(
        self, leaf: Leaf, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention of queries (tokens, n_heads, 1, head_dim), each to its own sequence."""
        if mask is not None and not (
            isinstance(mask, RaggedMask) and narrowed(mask.leaf.rule, mask.window_size) == leaf.rule
        ):
            raise NotSupportedError(f"layer {leaf.name} wants a mask of another kind than its cache's")
        given = Attending(queries.swapaxes(0, 2), None, None, scale, sinks)
        return attend(self.step(leaf), leaf.index, given).swapaxes(0, 2)

    def _batch(self) -> Batch:
        positions: list[int] = []
        sequences: list[int] = []
        for conversation, begin, (_, count) in zip(
            self.conversations, self.begins, self.columns, strict=True
        ):
            positions += range(begin, begin + count)
            sequences += [conversation.sequence] * count
        return Batch(positions, sequences)

    def _read(self, leaf: Leaf) -> list[mx.array | None]:
        raise NotSupportedError("recurrences need their tokens in a row")

    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None:
        raise NotSupportedError("recurrences need their tokens in a row")


class TokenRows(Rows):
    """Conversations that take some tokens each, as one input of shape (tokens, 1).

    Args:
        counts: how many tokens of each conversation.
    """

    def __init__(self, pool: Pool, conversations: Sequence[Conversation], counts: Sequence[int]) -> None:
        super().__init__(pool, conversations, is_batch=True)
        self._counts = list(counts)

    @property
    def _input_rows(self) -> int:
        return sum(self._counts)

    def _columns_of(self, n: int) -> list[Columns]:
        return [(0, count) for count in self._counts]

    def _forward_of(self, columns: Sequence[Columns], n: int, is_ragged: bool) -> Forward:
        return TokenForward(self.pool, self.conversations, columns, n)

    def _find_offsets(self) -> tuple[Any, Any]:
        offsets: list[int] = []
        for position, conversation, count in zip(
            self.positions, self.conversations, self._counts, strict=True
        ):
            first = position + conversation.head.lead
            offsets += range(first, first + count)
        before = mx.array(offsets, mx.int32)
        return before, before + 1
