"""Attention as matrix products, where `mx.fast.scaled_dot_product_attention` is slow or does not apply.

That is over keys in several pieces, which need no concatenation, over quantized cells, and on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from ..storage.buffers import Lanes
from ..storage.codec import Plain


def scores_of(rows: mx.array, pieces: Sequence[Lanes], scale: float = 1.0) -> mx.array:
    """Returns the products of rows (1, heads, m, dim) with the S keys of all pieces, times scale.

    They are (1, heads, m, S).
    """
    parts = [keys.scores(rows, scale) for keys, _ in pieces]
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def weighted_sum(weights: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Returns the sums of all values by weights (1, heads, m, S), (1, heads, m, value_dim)."""
    if len(pieces) == 1:
        return pieces[0][1].weighted(weights)
    borders = list(accumulate(keys.arrays[0].shape[2] for keys, _ in pieces))
    shares = mx.split(weights, borders[:-1], axis=-1)
    # Add in float32, so that rounding does not grow with the number of pieces.
    sums = (values.weighted(share) for share, (_, values) in zip(shares, pieces, strict=True))
    first, *rest = (part.astype(mx.float32) for part in sums)
    return sum(rest, start=first)


STRETCH = 128
"""The number of queries in a stretch of a causal block, on devices where MLX multiplies hidden keys."""


def attend_all(rows: mx.array, pieces: Sequence[Lanes], scale: float = 1.0) -> mx.array:
    """Attends to all keys without a mask.

    Rows are queries (1, n_kv_heads, m, head_dim), to be multiplied by scale; returns (1, n_kv_heads, m,
    value_dim).
    """
    return weighted_sum(mx.softmax(scores_of(rows, pieces, scale), axis=-1, precise=True), pieces)


def attend_levels(
    rows: mx.array, own: Lanes, mask: mx.array | None, prefix: Sequence[Lanes], sinks: mx.array | None
) -> mx.array:
    """Attends from B rows, each to cells of its own, and to a prefix that they share and that is read once.

    Args:
        rows: scaled queries (B, n_kv_heads, m, head_dim).
        own: the cells of each row, (B, n_kv_heads, S, ...).
        mask: (B, 1, 1, S), True where a row sees a cell of its own; None if it sees all.
        prefix: the cells that all rows see, (1, n_kv_heads, P, ...).
        sinks: learned sinks (n_kv_heads, m), or None.

    Returns:
        (B, n_kv_heads, m, value_dim).
    """
    n, groups, m, _ = rows.shape
    scores = own[0].scores(rows)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    pieces = [scores]
    if prefix:
        # All rows become rows of one product: heads first.
        together = scores_of(rows.swapaxes(0, 1).reshape(1, groups, n * m, -1), prefix)
        pieces.append(together.reshape(groups, n, m, -1).swapaxes(0, 1))
    if sinks is not None:
        pieces.append(mx.broadcast_to(sinks.astype(scores.dtype)[None, :, :, None], (n, groups, m, 1)))
    size = scores.shape[3]
    weights = mx.softmax(mx.concatenate(pieces, axis=-1) if pieces[1:] else scores, axis=-1, precise=True)
    if not pieces[1:]:
        return own[1].weighted(weights)
    out = own[1].weighted(weights[..., :size])
    if prefix:
        shared = weights[..., size : size + pieces[1].shape[3]].swapaxes(0, 1).reshape(1, groups, n * m, -1)
        read = weighted_sum(shared, prefix).reshape(groups, n, m, -1).swapaxes(0, 1)
        # Add in float32, so that rounding does not grow.
        out = out.astype(mx.float32) + read.astype(mx.float32)
    return out


def attend_single(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Attends from one token's queries (1, n_heads, 1, head_dim) to keys (1, n_kv_heads, S, head_dim).

    Returns (1, n_heads, 1, value_dim), in the dtype of the queries.
    """
    _, heads, _, dim = queries.shape
    groups = keys.shape[1]
    # Query heads that share a K/V head become rows of one product.
    rows = (queries * scale).reshape(1, groups, heads // groups, dim)
    return attend_all(rows, [(Plain(keys), Plain(values))]).reshape(1, heads, 1, -1).astype(queries.dtype)


def attend_causal(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Causal attention in stretches of queries, so that keys after a stretch are not multiplied.

    The queries (B, n_heads, n, head_dim) are those of the newest n tokens of S keys (B, n_kv_heads, S,
    head_dim). Returns (B, n_heads, n, value_dim).
    """
    n, size = queries.shape[2], keys.shape[2]
    outputs = []
    for begin in range(0, n, STRETCH):
        end = min(n, begin + STRETCH)
        q, k, v = queries[:, :, begin:end], keys[:, :, : size - n + end], values[:, :, : size - n + end]
        outputs.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal"))
    return mx.concatenate(outputs, axis=2)
