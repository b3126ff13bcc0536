"""Attention as matrix products, where `mx.fast.scaled_dot_product_attention` is slow or does not apply.

That is over keys in several pieces, which need no concatenation, over quantized cells, and on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from ..storage.buffers import Lanes
from ..storage.codec import Plain


def scores_of(rows: mx.array, pieces: Sequence[Lanes], scale: float = 1.0) -> mx.array:
    """Returns the products of rows (1, heads, m, dim) with the S keys of all pieces, times scale.

    They are (1, heads, m, S).
    """
    if len(pieces) == 1:
        return pieces[0][0].scores(rows, scale)
    return mx.concatenate([keys.scores(rows, scale) for keys, _ in pieces], axis=-1)


def weighted_sum(weights: mx.array, pieces: Sequence[Lanes], others: Sequence[mx.array] = ()) -> mx.array:
    """Returns the sums of all values by weights (1, heads, m, S), plus others, (1, heads, m, value_dim)."""
    [*before, (_, last)], sums = pieces, list(others)
    if before:
        borders = list(accumulate(keys.arrays[0].shape[2] for keys, _ in before))
        *shares, weights = mx.split(weights, borders, axis=-1)
        sums += [values.weighted(share) for (_, values), share in zip(before, shares, strict=True)]
    if not sums:
        return last.weighted(weights)
    if isinstance(last, Plain) and len(sums) <= 2:
        # One primitive, which adds in float32.
        return mx.addmm(sum(sums[1:], start=sums[0]), weights, last.array)
    sums.append(last.weighted(weights))
    # Add in float32, so that rounding does not grow with the number of pieces.
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


class Apart(NamedTuple):
    """Keys and values that only some of B rows see.

    Attributes:
        groups: for each group of rows, their number and the cells that they see, (1, n_kv_heads, S, ...).
        order, back: the indices that sort the rows by group, and those that undo it; None if they are sorted.
    """

    groups: list[tuple[int, list[Lanes]]]
    order: mx.array | None
    back: mx.array | None

    def scores(self, rows: mx.array) -> mx.array:
        """Returns the products of rows (B, heads, m, dim) with the keys that each sees, padded with -inf."""
        widest = max(_size(pieces) for _, pieces in self.groups)

        def of(own: mx.array, pieces: list[Lanes]) -> mx.array:
            if not pieces:
                return mx.full((*own.shape[:3], widest), -mx.inf, own.dtype)
            scores, missing = _scores_of_all(own, pieces), widest - _size(pieces)
            edges = [(0, 0), (0, 0), (0, 0), (0, missing)]
            return mx.pad(scores, edges, constant_values=-mx.inf) if missing else scores

        return self._by_group(rows, of)

    def weighted(self, weights: mx.array) -> mx.array:
        """Returns the sums of the values that each row sees by weights, whose shape is that of the scores."""
        dim = max(values.dim for _, pieces in self.groups for _, values in pieces)

        def of(own: mx.array, pieces: list[Lanes]) -> mx.array:
            if not pieces:
                return mx.zeros((*own.shape[:3], dim), own.dtype)
            return _weighted_of_all(own[..., : _size(pieces)], pieces)

        return self._by_group(weights, of)

    def _by_group(self, rows: mx.array, of: Callable[[mx.array, list[Lanes]], mx.array]) -> mx.array:
        """Joins the results of a function of each group's rows and cells."""
        rows = rows if self.order is None else rows[self.order]
        borders = list(accumulate(n for n, _ in self.groups))
        each = zip(mx.split(rows, borders[:-1]), self.groups, strict=True)
        joined = mx.concatenate([of(own, pieces) for own, (_, pieces) in each])
        return joined if self.back is None else joined[self.back]


def attend_levels(
    rows: mx.array,
    own: Sequence[Lanes],
    mask: mx.array | None,
    prefix: Sequence[Lanes],
    apart: Apart | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attends from B rows, each to cells of its own, and to cells that several share and that are read once.

    Args:
        rows: scaled queries (B, n_kv_heads, m, head_dim).
        own: the cells of each row, (B, n_kv_heads, S, ...), in pieces.
        mask: (B, 1, 1, S), True where a row sees a cell of its own; None if it sees all.
        prefix: the cells that all rows see, (1, n_kv_heads, P, ...).
        apart: the cells that only some rows see.
        sinks: learned sinks (n_kv_heads, m), or None.

    Returns:
        (B, n_kv_heads, m, value_dim).
    """
    n, heads, m, _ = rows.shape
    scores = scores_of(rows, own)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    pieces = [scores]
    if prefix:
        pieces.append(_scores_of_all(rows, prefix))
    if apart:
        pieces.append(apart.scores(rows))
    if sinks is not None:
        pieces.append(mx.broadcast_to(sinks.astype(scores.dtype)[None, :, :, None], (n, heads, m, 1)))
    weights = mx.softmax(mx.concatenate(pieces, axis=-1) if pieces[1:] else scores, axis=-1, precise=True)
    if not pieces[1:]:
        return weighted_sum(weights, own)
    borders = list(accumulate(piece.shape[3] for piece in pieces))
    of_own, *shares = mx.split(weights, borders[:-1], axis=-1)
    read = [_weighted_of_all(shares.pop(0), prefix)] if prefix else []
    if apart:
        read.append(apart.weighted(shares.pop(0)))
    return weighted_sum(of_own, own, read)


def _size(pieces: Sequence[Lanes]) -> int:
    """The number of cells in all pieces."""
    return sum(keys.arrays[0].shape[2] for keys, _ in pieces)


def _scores_of_all(rows: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Returns the products of rows (B, heads, m, dim) with keys that all see, as rows of one product."""
    n, heads, m, dim = rows.shape
    together = scores_of(rows.swapaxes(0, 1).reshape(1, heads, n * m, dim), pieces)
    return together.reshape(heads, n, m, -1).swapaxes(0, 1)


def _weighted_of_all(weights: mx.array, pieces: Sequence[Lanes]) -> mx.array:
    """Returns the sums of values that all rows see, by weights (B, heads, m, S), as rows of one product."""
    n, heads, m, size = weights.shape
    together = weighted_sum(weights.swapaxes(0, 1).reshape(1, heads, n * m, size), pieces)
    return together.reshape(heads, n, m, -1).swapaxes(0, 1)


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
