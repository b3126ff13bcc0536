"""A pass in which every token is a row of the model's input, so that sequences need not be alike.

A prompt's block and other sequences' single tokens go through the model together, as (tokens, 1)
with an offset for each. Only attention asks which rows belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..arrays.mask import Mask
from ..caches.step import Step
from ..cells.rules import Rule
from ..errors import NotSupportedError
from .conversation import Conversation
from .forward import Forward, History
from .layout import Leaf
from .padding import Columns
from .pool import Pool
from .rows import Rows


class TokenForward(Forward):
    """The tokens of all sequences, one after the other, each as a row. Only handles stand for histories."""

    def __init__(
        self, pool: Pool, conversations: Sequence[Conversation], columns: Sequence[Columns], n: int
    ) -> None:
        super().__init__(pool, conversations, columns, n, is_ragged=True)

    def _tokens(self, array: mx.array) -> mx.array:
        return array.swapaxes(0, 2)

    def _rows(self, tokens: mx.array) -> mx.array:
        return tokens.swapaxes(0, 2)

    def _exchange(self, step: Step, leaf: Leaf, keys: mx.array, values: mx.array) -> History:
        raise _no_arrays()

    def _arrays(self, step: Step, leaf: Leaf) -> History:
        raise _no_arrays()

    def _mask(self, step: Step, leaf: Leaf, rule: Rule, return_array: bool) -> Mask:
        raise _no_arrays()

    def _array_mask(self, step: Step, rule: Rule) -> mx.array:
        raise _no_arrays()

    def _read(self, leaf: Leaf) -> list[mx.array | None]:
        raise _no_arrays()

    def _write(self, leaf: Leaf, arrays: list[mx.array | None]) -> None:
        raise _no_arrays()


def _no_arrays() -> NotSupportedError:
    return NotSupportedError("tokens that are rows of their own have no history or state in one piece")


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
