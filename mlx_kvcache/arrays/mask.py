"""Masks, compared on the device from a few ints per token."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..cells.rules import Rule, visible

Mask = mx.array | Literal["causal"] | None
Ints = NDArray[np.signedinteger]


def positions_of(ranges: list[tuple[int, int]]) -> Ints:
    """Half-open ranges of positions, one after the other."""
    return np.concatenate([np.arange(low, high, dtype=np.int32) for low, high in ranges])


def array_mask(
    rule: Rule,
    queries: tuple[Ints, Ints],
    keys: tuple[Ints, Ints],
    later: NDArray[np.bool_] | None,
    padding: int,
    dtype: mx.Dtype | None,
) -> mx.array:
    """Which keys each query sees.

    Args:
        queries: positions and sequences of the n queries.
        keys: positions and sequences of the S keys; a sequence of -1 is seen by nobody.
        later: (n,) queries that also see later tokens, or None.
        padding: cells to hide at the end.
        dtype: None for booleans, else the type of additive masks.

    Returns:
        (n, S + padding), True or 0 = visible, False or -inf = hidden.
    """
    q_positions, q_sequences = (mx.array(part)[:, None] for part in queries)
    k_positions, k_sequences = (mx.array(np.pad(part, (0, padding), constant_values=-1)) for part in keys)
    upper = mx.array(later)[:, None] if later is not None else mx.array(False)
    seen: mx.array = visible(rule, q_positions, k_positions, upper) & (q_sequences == k_sequences)
    if dtype is None:
        return seen
    return mx.where(seen, mx.array(0, dtype), mx.array(-mx.inf, dtype))
