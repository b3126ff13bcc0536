"""Weighted sums over pieces of a history."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache.attend.products import weighted_sum
from mlx_kvcache.storage.codec import Plain


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("pieces", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_many_pieces_cost_no_more_precision_than_two(dtype: mx.Dtype, pieces: int) -> None:
    drawn = np.random.default_rng(pieces)
    weights = mx.softmax(mx.array(drawn.standard_normal((1, 2, 3, 640)), mx.float32), axis=-1).astype(dtype)
    values = mx.array(drawn.standard_normal((1, 2, 640, 64)) + 1, dtype)
    lanes = [(Plain(piece), Plain(piece)) for piece in mx.split(values, pieces, axis=2)]
    exact = numbers(weights) @ numbers(values)

    def error(found: mx.array) -> float:
        return float(np.sqrt(np.square(numbers(found) - exact).mean()))

    assert error(weighted_sum(weights, lanes).astype(dtype)) <= 1.5 * error(weights @ values)
