"""What a GPU launches for a token, counted: no count rises, on any machine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from benchmarks.bounds import COUNTS
from benchmarks.counts import as_on_a_gpu, fused, primitives
from benchmarks.graph import CASES, counted, evaluations, many, packed_row


@pytest.mark.parametrize("key", CASES)
def test_counts_are_within_their_bounds(key: str) -> None:
    with as_on_a_gpu():
        rows = counted(key, CASES[key]())
    for row in rows:
        assert row.key not in COUNTS or COUNTS[row.key].is_met(row), row


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_of_many_has_fewer_primitives_than_mlx_lms(rows: int) -> None:
    with as_on_a_gpu():
        counts = many(rows)
    for row in counts:
        assert COUNTS[row.key].is_met(row), row


def test_a_transform_is_three_products_more() -> None:
    """Of the new keys, of the new values and of the output; the queries' takes the place of their scale.

    The newest tokens in float take five more: to keep their keys and values, and to multiply queries and join
    the scores and the sums.
    """
    ways: list[dict[str, Any]] = [{"kv_recent": 0}, {"kv_recent": 0, "kv_text": range(20)}, {}]
    with as_on_a_gpu():
        plain, *others = (
            counted("", packed_row(8 - 4 * bool(n), **way))[0].ours for n, way in enumerate([{}, *ways])
        )
    assert others == [plain + 3, plain + 3, plain + 8]


@pytest.mark.parametrize(("key", "steps"), [("one", 280), ("batch.8", 40)])
def test_tokens_wait_where_buffers_grow_only(key: str, steps: int) -> None:
    with as_on_a_gpu():
        waits, most = evaluations(key, steps)
    assert waits.ours <= steps / 10 and COUNTS[most.key].is_met(most), (waits, most)


def test_primitives_are_counted_without_views() -> None:
    a, b = mx.ones((2, 4)), mx.ones((4, 2))
    mx.eval(a, b)
    assert primitives((a @ b).reshape(4)[1:3].T) == {"Matmul": 1}
    a[0] = b[:, 0]
    assert primitives(a) == {"SliceUpdate": 1}
    q = mx.ones((1, 2, 1, 64))
    mx.eval(q)
    with fused():
        found = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=None)
        assert primitives(mx.fast.rms_norm(found, None, 1e-5)) == {"Depends": 2} and found.shape == q.shape
