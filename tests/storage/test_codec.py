"""Products of rows with lanes, in each of the ways that they are multiplied."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache.quantization import Codec, centers_of
from mlx_kvcache.storage.codec import Plain, packed


@pytest.mark.parametrize("cells", [1, 383, 384, 600])
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("is_view", [False, True])
def test_scores_are_the_products_of_each_row_with_each_cell(
    rows: int, cells: int, is_view: bool, device: str
) -> None:
    drawn = np.random.default_rng(cells * 10 + rows)
    queries = drawn.standard_normal((1, 2, rows, 32)).astype(np.float32)
    keys = drawn.standard_normal((1, 2, cells, 32)).astype(np.float32)
    lane = Plain(mx.array(keys))
    if is_view:
        wide = np.concatenate([np.full((1, 2, 7, 32), 1e9, np.float32), keys, keys], axis=2)
        lane = Plain(mx.array(wide)).at((slice(None), slice(None), slice(7, 7 + cells)))
    found = np.array(lane.scores(mx.array(queries)))
    assert found.shape == (1, 2, rows, cells)
    np.testing.assert_allclose(found, queries @ keys.swapaxes(-1, -2), atol=1e-4)


@pytest.mark.parametrize("codec", [Codec(8, 64), Codec(6, 64, "hadamard"), Codec(6, 32, "hadamard")])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_packed_products_are_those_of_the_decoded_cells(rows: int, codec: Codec, device: str) -> None:
    dim = 96 if codec.group_size == 32 else 64
    keys, queries = (mx.random.normal((1, 2, n, dim), key=mx.random.key(n)) for n in (500, rows))
    lane, weights = packed(keys, codec), mx.softmax(mx.random.normal((1, 2, rows, 500)), axis=-1)
    plain = Plain(lane.decoded(mx.float32))
    assert mx.abs(plain.array - keys).max() < 0.2
    for scale in (1.0, 0.3):
        assert mx.allclose(lane.scores(queries, scale), plain.scores(queries, scale), atol=1e-3).item()
    assert mx.allclose(lane.weighted(weights), plain.weighted(weights), atol=1e-3).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_transform_spreads_large_features(dim: int, dtype: mx.Dtype, device: str) -> None:
    """And neither rounding nor a large feature's sums leave the range of 16 bits."""
    keys = mx.random.normal((1, 2, 50, dim), key=mx.random.key(0))
    keys[..., 7] = 20
    keys[0, 0, 0] = 3000
    keys = keys.astype(dtype)
    errors = [
        mx.abs(packed(keys, Codec(4, 32, transform)).decoded(mx.float32) - keys).astype(mx.float32)[0, 1]
        for transform in ("none", "hadamard")
    ]
    assert errors[1].square().mean() < 0.5 * errors[0].square().mean()
    assert mx.allclose(packed(keys, Codec(4, 32, "hadamard")).decoded(dtype)[0, 0, 0], mx.array(3000), 1e-2)


def test_packed_products_without_a_kernel_for_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an NVIDIA GPU, which multiplies packed cells of some shapes only."""
    keys = iter(mx.random.split(mx.random.key(1), 3))
    cells = packed(mx.random.normal((1, 2, 34, 64), key=next(keys)), Codec(8, 64))
    rows, weights = (mx.random.normal((1, 2, 3, n), key=next(keys)) for n in (64, 34))
    expected = cells.scores(rows), cells.weighted(weights)
    monkeypatch.setattr("mlx_kvcache.storage.codec.is_cuda", lambda: True)
    monkeypatch.setattr(mx, "quantized_matmul", None)
    for found, product in zip((cells.scores(rows), cells.weighted(weights)), expected, strict=True):
        assert np.allclose(np.array(found), np.array(product), atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_what_all_tokens_have_in_common_costs_no_bits_with_a_center(
    dim: int, dtype: mx.Dtype, device: str
) -> None:
    """In each head and level, for blocks of features and for single ones, whatever its sign and length."""
    common, noise, queries = (
        mx.random.normal(shape, key=mx.random.key(n))
        for n, shape in enumerate([(1, 2, 1, dim), (2, 2, 50, dim), (2, 2, 3, dim)])
    )
    keys = (
        noise + common * mx.array([[-9.0], [5.0]])[None, :, None] + mx.arange(2)[:, None, None, None]
    ).astype(dtype)
    [(_, center, other)] = centers_of({3: (common[0, :, 0], mx.zeros((2, dim)))})
    plain, centered, zero = (
        packed(keys, codec)
        for codec in (
            Codec(4, 32, "hadamard"),
            Codec(4, 32, "hadamard", center),
            Codec(4, 32, "hadamard", other),
        )
    )
    errors = [
        mx.square(lane.decoded(mx.float32) - keys.astype(mx.float32)).mean(axis=(0, 2, 3))
        for lane in (plain, centered, zero)
    ]
    assert (errors[1] < 0.3 * errors[0]).all()
    assert mx.allclose(errors[0], errors[2], rtol=1e-3)
    decoded = Plain(centered.decoded(mx.float32))
    weights = mx.softmax(mx.random.normal((2, 2, 3, 50), key=mx.random.key(9)), axis=-1)
    assert mx.allclose(centered.scores(queries, 0.3), decoded.scores(queries, 0.3), rtol=1e-3, atol=1e-2)
    assert mx.allclose(centered.weighted(weights), decoded.weighted(weights), rtol=1e-3, atol=1e-2)
