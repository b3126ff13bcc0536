"""Masks, compared on the device from a few ints per token."""

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
    """Half-open ranges of positions, one after the other."""
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
    """Which keys each query sees.

    Args:
        queries, keys: positions of the n queries and the S keys.
        owners: their sequences; None where all are of one.
        later: (n,) queries that also see later tokens, or None.
        padding: cells to hide at the end.
        dtype: None for booleans, else the type of additive masks.

    Returns:
        (n, S + padding), True or 0 = visible, False or -inf = hidden.
    """
    if isinstance(rule, (Window, Chunk)) and rule.size > _FARTHEST:
        # As far as positions go, which the device has in 32 bits.
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
