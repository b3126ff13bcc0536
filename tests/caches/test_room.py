"""Making room and taking it: shifting, copies, reserving, and what is allocated."""

from __future__ import annotations

import pickle

import mlx.core as mx
import pytest

from mlx_kvcache import (
    Batch,
    CacheConfig,
    CacheError,
    CacheFullError,
    CausalCache,
    CausalOptions,
    ChunkedAttentionCache,
    NotSupportedError,
    SlidingWindowCache,
    attention,
    slide,
)
from tests.caches.data import causal, coded, column, fed, refused


def test_full_and_still_usable() -> None:
    cache = causal(room=8)
    fed(cache, range(3), sequence=0)
    fed(cache, range(3), sequence=5)
    with pytest.raises(CacheFullError) as caught:
        cache.start_forward(Batch.run(0, 3, 3))
    assert (caught.value.needed, caught.value.free, caught.value.capacity) == (3, 2, 8)
    assert "3 cells needed, 2 free of a capacity of 8" in str(caught.value)
    fed(cache, [3, 4], sequence=0)
    cache.remove(5, 0)
    keys, _, _ = fed(cache, [5, 6, 7], sequence=0)
    assert column(keys) == list(range(8))


def test_a_failing_shift_hook_changes_nothing() -> None:
    calls = []

    def failing(layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
        calls.append((layer, keys.shape, offsets.tolist()))
        if layer == 1:
            raise RuntimeError("hook")
        return keys

    cache = causal(shift=failing)
    cache.start_forward(Batch.run(0, 0, 6))
    for layer in (0, 1):
        cache.layer(layer).put(*coded(range(6)))
    refused(cache, lambda: cache.remove(0, 1, 3), RuntimeError, "hook")
    assert calls == [(0, (1, 1, 3, 2), [-2] * 3), (1, (1, 1, 3, 2), [-2] * 3)]
    wrong = causal(shift=lambda layer, keys, offsets: keys[:, :, 1:])
    fed(wrong, range(6))
    refused(
        wrong,
        lambda: wrong.remove(0, 1, 3),
        ValueError,
        r"\(1, 1, 2, 2\) in layer 0, expected \(1, 1, 3, 2\)",
    )
    longer = causal(shift=lambda layer, keys, offsets: mx.concatenate([keys, keys], axis=2))
    fed(longer, range(6))
    refused(
        longer,
        lambda: longer.remove(0, 1, 3),
        ValueError,
        r"\(1, 1, 6, 2\) in layer 0, expected \(1, 1, 3, 2\)",
    )


def test_without_a_hook_only_tails_go() -> None:
    cache = causal(shift=None)
    fed(cache, range(6))
    refused(cache, lambda: cache.remove(0, 1, 3), NotSupportedError, r"\[1, 3\) from sequence 0 of length 6")
    cache.remove(0, 4, 99)
    cache.remove(0, 2, 2)
    cache.remove(0, 50, 60)
    cache.remove(7, 0, 3)
    assert column(fed(cache, [4])[0]) == [0, 1, 2, 3, 4]


def test_moving_shared_cells_needs_room_for_a_copy() -> None:
    cache = causal(room=8)
    fed(cache, range(6))
    cache.copy_prefix(0, 1, 6)
    refused(cache, lambda: cache.remove(1, 1, 3), CacheFullError, "3 cells needed, 2 free of a capacity of 8")
    cache.remove(1, 5)
    cache.remove(1, 2, 3)
    cache.remove(0, 4)
    assert column(fed(cache, [4], sequence=1)[0]) == [0, 1, 2, 3, 4]
    assert column(fed(cache, [4], sequence=0)[0]) == [0, 1, 2, 3, 4]


def test_sliding_the_context() -> None:
    cache = causal()
    fed(cache, range(11))
    assert slide(cache, 0, keep=3) == 4
    assert column(fed(cache, [7])[0]) == list(range(8))
    assert slide(cache, 0, keep=2, discard=1) == 1
    assert slide(cache, 0, keep=20) == 0
    assert slide(cache, 0, keep=5, discard=50) == 2
    assert slide(cache, 42) == 0
    assert cache.end(0) == 5


def test_reserving_allocates_the_whole_room_and_stores_nothing() -> None:
    cache = causal(room=4096)
    fed(cache, range(4))
    ends, held = cache.end(0), cache.nbytes
    mx.clear_cache()
    before = mx.get_active_memory()
    cache.start_forward(Batch.run(0, 0, 2), reserve=True)
    refused(cache, lambda: cache.get(), CacheError, "layer 0 has had no put")
    cache.put(*coded(range(2)))
    assert mx.get_active_memory() - before >= 4096 * (2 + 3) * 4
    keys, values, mask = cache.get()
    assert keys.shape == (1, 1, 4096, 2)
    assert values.shape == (1, 1, 4096, 3)
    assert isinstance(mask, mx.array)
    assert mask.shape == (2, 4096)
    assert (cache.end(0), cache.nbytes) == (ends, held)
    assert column(fed(cache, [4])[0]) == [0, 1, 2, 3, 4]


def test_a_snapshot_takes_the_slack_of_others() -> None:
    """40 and 10 of 100 cells are held, more than 60 are allocated, and 40 more come."""
    cache = causal(room=100)
    fed(cache, range(40))
    fed(cache, range(10), sequence=1)
    assert cache._table.allocated > 60
    cache._plan_restore(2, cache._snapshot(0)).commit()
    assert (cache._table.live, cache._table.allocated) == (90, 90)
    assert column(fed(cache, [40], sequence=2)[0]) == [*range(41)]
    cache.check()


def test_a_snapshot_in_another_cache() -> None:
    """It brings its layers along; where there is no room for it, the error says how much there is."""
    cache, other = causal(room=100), causal(room=50)
    fed(cache, range(40))
    other._plan_restore(3, cache._snapshot(0)).commit()
    assert column(fed(other, [40], sequence=3)[0]) == [*range(41)]
    fed(other, range(5), sequence=1)
    refused(
        other,
        lambda: other._plan_restore(1, cache._snapshot(0)).commit(),
        CacheFullError,
        "40 cells needed, 9 free of a capacity of 50",
    )


def test_a_snapshot_that_fills_the_room() -> None:
    cache, other = causal(room=40), causal(room=40)
    fed(cache, range(40))
    other._plan_restore(3, cache._snapshot(0)).commit()
    assert (other.end(3), other._table.live) == (40, 40)


def test_a_snapshot_with_a_gap() -> None:
    """Between the sinks and the window nothing is held, and what follows keeps its positions."""
    cache = SlidingWindowCache(6, sinks=2)
    cache.init(mx.float32, capacity=50)
    fed(cache, range(20))
    cache._plan_restore(1, cache._snapshot(0)).commit()
    expected = column(fed(cache, [20])[0])
    assert column(fed(cache, [20], sequence=1)[0]) == expected == [0, 1, *range(15, 21)]
    cache.check()


def test_unused_cells_are_given_back_under_pressure_only() -> None:
    cache, capacities = causal(room=100), list[list[int]]()
    for sequence in range(3):
        fed(cache, range(20), sequence)
        capacities.append(list(cache._table.capacity.values()))
    assert capacities == [[64], [64, 28], [20, 20, 33]]
    cache.check()


def test_reserving_a_window_with_sinks() -> None:
    """As much as a block can see: what is before it in the window, the sinks and itself."""
    cache = SlidingWindowCache(5, sinks=2)
    cache.init(mx.float32, capacity=50)
    cache.start_forward(Batch.run(0, 0, 3), reserve=True)
    cache.put(*coded(range(3)))
    assert cache.get()[0].shape == (1, 1, 4 + 2 + 3, 2)


def test_reserving_a_chunk() -> None:
    cache = ChunkedAttentionCache(5)
    cache.init(mx.float32, capacity=50)
    cache.start_forward(Batch.run(0, 0, 3), reserve=True)
    cache.put(*coded(range(3)))
    assert cache.get()[0].shape == (1, 1, 4 + 3, 2)


def test_reserving_with_padding() -> None:
    cache = causal(room=20, config=CacheConfig(padding=16))
    cache.start_forward(Batch.run(0, 0, 2), reserve=True)
    cache.put(*coded(range(2), heads=3))
    keys, values, mask = cache.get()
    assert (keys.shape, values.shape) == ((1, 3, 32, 2), (1, 3, 32, 3))
    assert isinstance(mask, mx.array) and mask.shape == (2, 32)


def test_attention_while_reserving() -> None:
    """It has the shape of what a full cache gives, and leaves nothing."""
    cache = causal(room=20)
    cache.start_forward(Batch.run(0, 0, 3), reserve=True)
    cache.set_causal(CausalOptions([1]))
    output = attention(mx.ones((1, 4, 3, 2)), *coded(range(3), heads=2), cache, scale=1.0)
    assert output.shape == (1, 4, 3, 3)
    assert (cache.end(0), cache.nbytes) == (0, 0)


def test_memory_is_taken_as_it_is_needed() -> None:
    cache = CausalCache()
    cache.init(mx.float32, max_sequences=100, capacity=100_000)
    fed(cache, range(10))
    assert cache.nbytes <= 64 * (2 + 3) * 4
    for sequence in range(1, 40):
        fed(cache, range(2), sequence=10**9 + sequence)
    assert cache.nbytes <= 40 * 64 * 5 * 4
    for sequence in range(1, 40):
        cache.remove(10**9 + sequence, 0)
    assert cache.nbytes <= 64 * (2 + 3) * 4


def test_slack_is_given_up_under_pressure() -> None:
    cache = causal(room=100)
    for sequence in range(9):
        fed(cache, range(11), sequence=sequence)
    assert cache._table.allocated <= 100
    fed(cache, [11], sequence=4)
    assert cache._table.live == 100
    with pytest.raises(CacheFullError):
        cache.start_forward(Batch([12], [4]))


def test_a_full_cache_survives_a_pickle() -> None:
    error = CacheFullError(1, 2, 3, "remove some")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # its own
    assert (str(again), again.hint, again.capacity) == (str(error), "remove some", 3)
