"""Scores and weighted sums over lanes that lie in several pieces, without copying them together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from ..arrays.pairs import Lanes


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
    first, *rest = (values.weighted(share) for share, (_, values) in zip(shares, pieces, strict=True))
    return sum(rest, start=first)
