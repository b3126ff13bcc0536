"""A rule of somebody's own has no name in files, and is not taken for one that has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, NotSupportedError
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.persist import save


@dataclass(frozen=True)
class Half:
    """A token sees the newer half of its sequence."""

    sinks = 0
    size = 64

    def lower(self, q: Any) -> Any:
        return q // 2


def test_it_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    rule: Any = Half()
    cache = PositionalCache(rule, 1, None)
    cache.init(mx.float32)
    with cache.forward(Batch.run(0, 0, 3)):
        cache.put(mx.zeros((1, 1, 3, 4)), mx.zeros((1, 1, 3, 4)))
    with pytest.raises(NotSupportedError, match="Half"):
        save(tmp_path / "half.safetensors", cache, 0)
    assert list(tmp_path.iterdir()) == []
