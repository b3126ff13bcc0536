"""Buffers that get longer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvcache import Batch, CausalCache, Quantization
from mlx_kvcache.storage import codec as lanes

LAYERS, TOKENS, BLOCK = 30, 2048, 256


def feed(cache: CausalCache, n: int, layers: int = 2) -> None:
    begin = cache.end(0)
    kv = mx.broadcast_to(mx.arange(begin, begin + n, dtype=mx.float32)[None, None, :, None], (1, 1, n, 32))
    with cache.forward(Batch.run(0, begin, n)):
        for layer in range(layers):
            cache.layer(layer).put(kv, -kv)
            mx.eval(cache.layer(layer).get()[:2])


def test_little_is_there_twice_while_all_layers_grow() -> None:
    """MLX alone would hold a third of all twice, as `KVCache` does."""
    cache = CausalCache()
    cache.init(mx.float32, capacity=1 << 16)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kv = mx.ones((1, 2, BLOCK, 64))
    for begin in range(0, TOKENS, BLOCK):
        with cache.forward(Batch.run(0, begin, BLOCK)):
            for layer in range(LAYERS):
                cache.layer(layer).put(kv, kv)
        mx.eval(cache._store.arrays)
    live = LAYERS * TOKENS * 2 * 64 * 2 * 4
    assert cache.nbytes == live
    assert mx.get_peak_memory() - before <= 1.13 * live


@pytest.mark.parametrize("quantization", [None, Quantization(8, group_size=32)], ids=["float", "8 bits"])
@pytest.mark.parametrize("refused", range(1, 5))
def test_no_memory_to_grow_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, quantization: Quantization | None, refused: int
) -> None:
    """Whichever of the arrays there is no memory for."""
    cache = CausalCache()
    cache.init(mx.float32, capacity=4096, quantization=quantization)
    feed(cache, 64)
    calls = []

    def limited(array: mx.array, cells: int) -> mx.array:
        calls.append(cells)
        if len(calls) == refused:
            raise MemoryError(f"no room for {cells} cells")
        return original(array, cells)

    original = lanes.grown
    monkeypatch.setattr("mlx_kvcache.storage.buffers.grown", limited)
    with pytest.raises(MemoryError, match="no room for"):
        feed(cache, 100)
    cache.check()
    assert cache.end(0) == 64
    monkeypatch.undo()
    feed(cache, 100)
    cache.check()
    with cache.forward(Batch.run(0, 164, 1)):
        for layer in range(2):
            cache.layer(layer).put(mx.full((1, 1, 1, 32), 164.0), mx.full((1, 1, 1, 32), -164.0))
        keys, values, _ = cache.layer(0).get()
    expected = np.arange(165)
    # In 8 bits equal features are stored as they are.
    assert np.allclose(np.array(keys)[0, 0, :, 0], expected, rtol=1e-3)
    assert np.allclose(np.array(values)[0, 0, :, 0], -expected, rtol=1e-3)
