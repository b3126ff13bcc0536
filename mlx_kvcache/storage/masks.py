"""Attention masks, computed on the device from the positions of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..cells.visibility import Chunk, Rule, Window, visible

Mask = mx.array | Literal["causal"] | None
Ints = NDArray[np.signedinteger]
_FARTHEST = 2**31 - 1


def positions_of(ranges: list[tuple[int, int]]) -> Ints:
    """Returns the positions in half-open ranges, concatenated."""
    return np.concatenate([np.arange(low, high, dtype=np.int32) for low, high in ranges])


def array_mask(
    rule: Rule,
    queries: Ints,
    keys: Ints,
    owners: tuple[Ints, Ints] | None = None,
    later: NDArray[np.bool_] | None = None,
    padding: int = 0,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Returns the mask (n, S + padding) of the keys that each query sees.

    Args:
        rule: the visibility rule.
        queries, keys: the positions of n queries, (n,), and of S keys, (S,).
        owners: the sequences of the queries and of the keys; None if there is only one.
        later: (n,), True for queries that also see later tokens; or None.
        padding: the number of hidden keys to add at the end.
        dtype: None for a boolean mask (True = visible), or the float dtype of an additive one (0 = visible).
    """
    if isinstance(rule, (Window, Chunk)) and rule.size > _FARTHEST:
        # Positions are int32 on the device, and none is higher than this.
        rule = replace(rule, size=_FARTHEST)
    upper = False if later is None else mx.array(later)[:, None]
    seen: mx.array = visible(rule, mx.array(queries)[:, None], mx.array(keys), upper)
    if owners:
        seen = seen & (mx.array(owners[0])[:, None] == mx.array(owners[1]))
    if padding:
        seen = mx.pad(seen, [(0, 0), (0, padding)])
    if dtype is None:
        return seen
    return mx.where(seen, mx.array(0, dtype), mx.array(-mx.inf, dtype))
