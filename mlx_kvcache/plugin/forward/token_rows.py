"""Rows of single tokens: the next tokens of several sequences in one input, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..pool.conversation import Conversation
from ..pool.pool import Pool
from .batch_rows import Rows
from .forward import Columns, Form


class TokenRows(Rows):
    """Conversations whose next tokens form one input of shape (tokens, 1), without padding.

    Args:
        counts: the number of new tokens of each conversation.
    """

    def __init__(self, pool: Pool, conversations: Sequence[Conversation], counts: Sequence[int]) -> None:
        super().__init__(pool, conversations, is_batch=True)
        self._counts = list(counts)

    @property
    def _input_rows(self) -> int:
        return sum(self._counts)

    def _columns_of(self, n: int) -> list[Columns]:
        return [(0, count) for count in self._counts]

    @property
    def _form(self) -> Form:
        return "tokens"

    def _find_offsets(self) -> tuple[Any, Any]:
        offsets: list[int] = []
        for position, conversation, count in zip(
            self.positions, self.conversations, self._counts, strict=True
        ):
            first = position + conversation.head.lead
            offsets += range(first, first + count)
        before = mx.array(offsets, mx.int32)
        return before, before + 1
