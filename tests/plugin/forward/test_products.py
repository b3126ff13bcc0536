"""Attention of a model's calls on a CPU, beside MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from mlx_kvcache.attend.products import attend_single
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.hosts import handles as ragged
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama

MODEL = tiny_llama(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
TEXT = [(5 * i + i * i) % 97 for i in range(400)]


@pytest.mark.parametrize("block", [1, 129, 400])
def test_both_ways_give_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_kvcache.storage.codec.is_cpu", lambda: True)
    ours = logits_of(MODEL, make_prompt_cache(MODEL), TEXT, block)
    monkeypatch.setattr("mlx_kvcache.storage.codec.is_cpu", lambda: False)
    assert difference(ours, logits_of(MODEL, make_prompt_cache(MODEL), TEXT, block)) <= 2e-5


def test_whoever_has_other_caches_gets_mlx_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function in the model's module serves them, too."""
    monkeypatch.setattr("mlx_kvcache.storage.codec.is_cpu", lambda: True)
    cache = make_prompt_cache(MODEL)
    calls: list[int] = []

    def counted(queries: mx.array, *rest: Any) -> Any:
        calls.append(queries.shape[1])
        return attend_single(queries, *rest)

    monkeypatch.setattr(ragged, "attend_single", counted)
    arrays = mx.ones((1, 8, 1, 8)), mx.ones((1, 2, 3, 8)), mx.ones((1, 2, 3, 8))
    attend = ragged.attending(base.scaled_dot_product_attention)
    theirs = attend(*arrays, cache=KVCache(), scale=1.0, mask=None)
    assert not calls
    ours = attend(*arrays, cache=cache[0], scale=1.0, mask=None)
    assert calls == [8] and mx.allclose(ours, theirs)
