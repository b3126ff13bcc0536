"""Attention as products: over lanes in several pieces, without copying them together, and on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from ..storage.buffers import Lanes
from ..storage.codec import Plain


def scores_of(rows: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Products of rows (1, heads, m, dim) with all keys, (1, heads, m, S)."""
    parts = [keys.scores(rows) for keys, _ in pieces]
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def weighted_sum(weights: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Sums of all values by weights (1, heads, m, S): (1, heads, m, value_dim)."""
    if len(pieces) == 1:
        return pieces[0][1].weighted(weights)
    borders = list(accumulate(keys.arrays[0].shape[2] for keys, _ in pieces))
    shares = mx.split(weights, borders[:-1], axis=-1)
    # Added in float32, so that each piece rounds its own share only.
    sums = (values.weighted(share) for share, (_, values) in zip(shares, pieces, strict=True))
    first, *rest = (part.astype(mx.float32) for part in sums)
    return sum(rest, start=first)


STRETCH = 128
"""Queries of a causal block that attend at once where MLX multiplies what they do not see."""


def attend_all(rows: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Attention of scaled queries (1, n_kv_heads, m, head_dim) to all keys: (1, n_kv_heads, m, value_dim)."""
    return weighted_sum(mx.softmax(scores_of(rows, pieces), axis=-1, precise=True), pieces)


def attend_single(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Attention of one token's queries (1, n_heads, 1, head_dim) to all keys (1, n_kv_heads, S, head_dim)."""
    _, heads, _, dim = queries.shape
    groups = keys.shape[1]
    # The query heads of a group are rows of one product.
    rows = (queries * scale).reshape(1, groups, heads // groups, dim)
    return attend_all(rows, [(Plain(keys), Plain(values))]).reshape(1, heads, 1, -1).astype(queries.dtype)


def attend_causal(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Causal attention of the newest n tokens, (B, n_heads, n, value_dim), in stretches of queries."""
    n, size = queries.shape[2], keys.shape[2]
    outputs = []
    for begin in range(0, n, STRETCH):
        end = min(n, begin + STRETCH)
        seen = size - n + end
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, begin:end], keys[:, :, :seen], values[:, :, :seen], scale=scale, mask="causal"
            )
        )
    return mx.concatenate(outputs, axis=2)
