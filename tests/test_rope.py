"""Re-basing keys, against rotating them at their new place in the first one."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import rope_utils
from mlx_lm.models.rope_utils import initialize_rope

from mlx_kvcache import NotSupportedError, rope_shift
from tests.plugin.running import difference

DIMS = 16
LONG = {
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "su": {"rope_type": "longrope", **LONG},
}


def module(name: str, traditional: bool = False) -> Any:
    return initialize_rope(DIMS, 10000.0, traditional, SCALINGS[name], 128)


@pytest.mark.parametrize("traditional", [False, True], ids=["", "traditional"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_shifted_key_is_the_key_rotated_there(name: str, traditional: bool) -> None:
    rope = module(name, traditional)
    shift = rope_shift.of(rope)
    content = mx.random.normal((1, 3, 5, DIMS + 4), key=mx.random.key(3))
    stored = rope(content, offset=40)
    for by in (-40, -7, 0, 3, 200):
        moved = shift(0, stored, mx.full((5,), by, mx.int32))
        assert difference(moved, rope(content, offset=40 + by)) < 5e-5 * math.sqrt(DIMS)
    assert mx.array_equal(moved[..., DIMS:], content[..., DIMS:])


def test_each_token_has_its_own_offset() -> None:
    rope = nn.RoPE(DIMS)
    content = mx.random.normal((1, 2, 4, DIMS), key=mx.random.key(4))
    offsets = [5, -2, 0, 11]
    moved = rope_shift(DIMS)(0, rope(content, offset=10), mx.array(offsets))
    for i, by in enumerate(offsets):
        there = rope(content[:, :, i : i + 1], offset=10 + i + by)
        assert mx.allclose(moved[:, :, i : i + 1], there, atol=1e-4)


def test_explicit_frequencies_take_the_place_of_the_base() -> None:
    shift = rope_shift.of(module("llama3"))
    same = rope_shift(DIMS, freqs=shift.freqs)
    keys, offsets = mx.ones((1, 1, 2, DIMS)), mx.array([3, 4])
    assert mx.array_equal(shift(0, keys, offsets), same(0, keys, offsets))


def test_half_precision_is_rotated_in_float32() -> None:
    keys = mx.random.normal((1, 1, 1, DIMS), key=mx.random.key(5)).astype(mx.bfloat16)
    shift, by = rope_shift(DIMS), mx.array([1000])
    exact = shift(0, keys.astype(mx.float32), by)
    assert mx.array_equal(shift(0, keys, by), exact.astype(mx.bfloat16))


@pytest.mark.skipif(not hasattr(rope_utils, "DynamicNTKScalingRoPE"), reason="mlx-lm 0.31 does not have it")
def test_what_depends_on_the_length_is_refused() -> None:
    dynamic = initialize_rope(DIMS, 10000.0, False, {"rope_type": "dynamic", "factor": 2.0}, 128)
    with pytest.raises(NotSupportedError, match="DynamicNTKScalingRoPE"):
        rope_shift.of(dynamic)


@pytest.mark.parametrize("other", [nn.Linear(4, 4), nn.Dropout(0.1), 3])
def test_other_modules_are_refused(other: object) -> None:
    with pytest.raises(NotSupportedError, match=type(other).__name__):
        rope_shift.of(other)


def test_a_module_that_lies_is_refused() -> None:
    class Odd(nn.RoPE):
        def __call__(self, x: mx.array, offset: Any = 0) -> Any:
            return super().__call__(x, offset=2 * offset)

    with pytest.raises(NotSupportedError, match="Odd"):
        rope_shift.of(Odd(DIMS))
