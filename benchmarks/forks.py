"""What forks hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, FORKS = 1000, 8


def run() -> Iterator[str]:
    """Bytes of K and V held by a 1,000-token conversation of SmolLM2's shape and its 8 forks."""
    model, _ = smollm2.load(mx.float32)
    ours, theirs = make_prompt_cache(model), [KVCache() for _ in model.layers]
    block = mx.zeros((1, 3, TOKENS, 64))
    token = mx.ones((1, 3, 1, 64))
    for cache in (ours, theirs):
        _write(cache, block)
    one = ours.pool.nbytes
    forks = [ours.fork() for _ in range(FORKS)]
    yield f"alone {one / 1e6:.1f} MB; with {FORKS} forks {ours.pool.nbytes / 1e6:.1f} MB"
    for fork in forks:
        _write(fork, token)
    yield f"after one token in each fork {ours.pool.nbytes / 1e6:.1f} MB"
    copies = [copy.deepcopy(theirs) for _ in range(FORKS)]
    for cache in copies:
        _write(cache, token)
    held = {
        id(a): a.nbytes for _, a in tree_flatten([[c.keys, c.values] for p in [theirs, *copies] for c in p])
    }
    yield f"mlx-lm's KVCache, copied {FORKS} times and one token in each: {sum(held.values()) / 1e6:.1f} MB"


def _write(cache, kv: mx.array) -> None:
    for layer in cache:
        layer.update_and_fetch(kv, kv)
    mx.eval([layer.state for layer in cache])
