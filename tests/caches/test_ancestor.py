"""The published behaviors of the Go package that these kinds descend from, with its windows w as w + 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import Batch, CausalCache, ChunkedAttentionCache, SlidingWindowCache
from mlx_kvcache.caches.base import KeyValueCache
from tests.caches.data import column
from tests.kinds import add_offsets

AnyCache = TypeVar("AnyCache", bound=KeyValueCache)


def visible(
    cache: KeyValueCache, positions: Sequence[int], sequences: list[int], contents: list[int]
) -> list[set[float]]:
    """What each token sees: contents are numbers of one feature, as in the tables of the Go tests."""
    batch = Batch(positions, sequences)
    with cache.forward(batch):
        keys = mx.array(contents, mx.float32)[None, None, :, None]
        cache.put(keys, keys)
        keys, _, mask = cache.get()
    size, n = keys.shape[2], len(batch)
    if mask is None:
        seen = np.ones((n, size), bool)
    else:
        seen = np.tril(np.ones((n, size), bool), size - n) if isinstance(mask, str) else np.array(mask)
    return [{content for content, shown in zip(column(keys), row, strict=True) if shown} for row in seen]


def started(cache: AnyCache) -> AnyCache:
    cache.init(mx.float32, max_sequences=2, capacity=16, max_batch=16)
    return cache


def test_causal_store() -> None:
    cache = started(CausalCache())
    assert visible(cache, [0, 1, 2, 3], [0] * 4, [1, 2, 3, 4]) == [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}]
    assert visible(cache, [4], [0], [5]) == [{1, 2, 3, 4, 5}]


def test_window_of_two_over_four_tokens_then_two_more() -> None:
    cache = started(SlidingWindowCache(2))
    assert visible(cache, [0, 1, 2, 3], [0] * 4, [1, 2, 3, 4]) == [{1}, {1, 2}, {2, 3}, {3, 4}]
    assert visible(cache, [4, 5], [0] * 2, [5, 6]) == [{4, 5}, {5, 6}]


def test_more_kept_than_the_window() -> None:
    """A memory of 4 beyond a window of 2 (w = 1, m = 3): three newest tokens can be dropped."""
    cache = started(SlidingWindowCache(2, rewind=3))
    visible(cache, [0, 1, 2, 3, 4, 5], [0] * 6, [1, 2, 3, 4, 5, 6])
    assert [cache.can_resume(0, p) for p in range(8)] == [True, False, False, True, True, True, True, False]
    cache.remove(0, 3)
    assert visible(cache, [3, 4], [0] * 2, [40, 50]) == [{3, 40}, {40, 50}]


def test_two_sequences_in_separate_batches() -> None:
    cache = started(SlidingWindowCache(2))
    assert visible(cache, [0, 1], [0, 0], [1, 2]) == [{1}, {1, 2}]
    assert visible(cache, [0, 1], [1, 1], [11, 12]) == [{11}, {11, 12}]
    assert visible(cache, [2, 3], [0, 0], [3, 4]) == [{2, 3}, {3, 4}]
    assert visible(cache, [2, 3], [1, 1], [13, 14]) == [{12, 13}, {13, 14}]


def test_chunk_of_two_over_batches_of_four_three_and_two() -> None:
    cache = started(ChunkedAttentionCache(2))
    assert visible(cache, range(4), [0] * 4, [1, 2, 3, 4]) == [{1}, {1, 2}, {3}, {3, 4}]
    assert visible(cache, range(4, 7), [0] * 3, [5, 6, 7]) == [{5}, {5, 6}, {7}]
    assert visible(cache, range(7, 9), [0] * 2, [8, 9]) == [{7, 8}, {9}]


def test_two_sequences_interleaved() -> None:
    cache = started(CausalCache())
    assert visible(cache, [0, 0, 1, 1], [0, 1, 0, 1], [1, 11, 2, 12]) == [{1}, {11}, {1, 2}, {11, 12}]
    assert visible(cache, [2, 2], [1, 0], [13, 3]) == [{11, 12, 13}, {1, 2, 3}]


def test_remove_at_the_end_and_in_the_middle() -> None:
    cache = started(CausalCache(shift=add_offsets))
    visible(cache, [0, 1, 2, 3], [0] * 4, [0, 1, 2, 3])
    visible(cache, [0, 1], [1] * 2, [0, 1])
    cache.remove(0, 2)
    assert visible(cache, [2, 2], [0, 1], [20, 21]) == [{0, 1, 20}, {0, 1, 21}]
    cache.remove(0, 0, 1)
    # What was 1 and 20 has moved down by one.
    assert visible(cache, [2], [0], [30]) == [{0, 19, 30}]


def test_prefix_copy() -> None:
    cache = started(CausalCache())
    visible(cache, [0, 1, 2, 3], [0] * 4, [1, 2, 3, 4])
    cache.copy_prefix(0, 1, 2)
    assert visible(cache, [2, 3], [1] * 2, [5, 6]) == [{1, 2, 5}, {1, 2, 5, 6}]
    assert visible(cache, [4], [0], [7]) == [{1, 2, 3, 4, 7}]


@pytest.mark.parametrize(("rewind", "resumable"), [(0, [5]), (1, [4, 5]), (2, [3, 4, 5])])
def test_resume_before_and_after_sliding(rewind: int, resumable: list[int]) -> None:
    cache = started(SlidingWindowCache(2, rewind=rewind))
    visible(cache, [0], [0], [1])
    assert [p for p in range(3) if cache.can_resume(0, p)] == [0, 1]
    visible(cache, [1, 2, 3, 4], [0] * 4, [2, 3, 4, 5])
    assert [p for p in range(1, 8) if cache.can_resume(0, p)] == resumable
