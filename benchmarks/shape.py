"""Makes caches and arrays of a model's shape, to measure attention without the rest of the model."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from benchmarks.setting import DIM, HEADS, KV_HEADS, LAYERS
from mlx_kvcache.plugin.hosts.handles import attending

_attend = attending(base.scaled_dot_product_attention)
SCALE = DIM**-0.5


class Shape(NamedTuple):
    """The shape of a model's attention; all layers are alike."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    dtype: mx.Dtype


SMOLLM2 = Shape(LAYERS, HEADS, KV_HEADS, DIM, mx.float32)


def shape_of(model: Any) -> Shape:
    """Read the shape from a model whose layers are alike.

    Raises:
        ValueError: the model's arguments do not contain the number of heads.
    """
    args = model.args
    try:
        heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
        dim = getattr(args, "head_dim", None) or args.hidden_size // heads
    except AttributeError as error:
        raise ValueError(f"{type(model).__module__} does not tell its heads: {error}") from error
    norms = (array for name, array in tree_flatten(model.parameters()) if "norm" in name)
    return Shape(len(model.layers), heads, kv_heads, dim, next(norms).dtype)


def arrays(
    n: int, seed: int = 0, rows: int = 1, shape: Shape = SMOLLM2
) -> tuple[mx.array, mx.array, mx.array]:
    """Make random queries (rows, n_heads, n, head_dim), and keys and values with n_kv_heads."""
    each = mx.random.split(mx.random.key(seed), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    made = [
        mx.random.normal((rows, h, n, shape.dim), key=key).astype(shape.dtype)
        for h, key in zip(heads, each, strict=True)
    ]
    mx.eval(made)
    return made[0], made[1], made[2]


def fill(cache: Any, length: int, seed: int = 0, step: int | None = None, shape: Shape = SMOLLM2) -> Any:
    """Write random keys and values into every layer, without attention."""
    _, keys, values = arrays(length, seed, shape=shape)
    for start in range(0, length, step or length):
        stop = min(length, start + (step or length))
        cache[0].make_mask(stop - start, return_array=False, window_size=None)
        for layer in cache:
            layer.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        evaluate(cache)
    return cache


def read(model: Any, cache: Any, text: mx.array, block: int) -> mx.array:
    """Run a model on a text (1, n) in blocks. Returns the logits of the last block."""
    for start in range(0, text.shape[1], block):
        logits: mx.array = model(text[:, start : start + block], cache=cache)
        mx.eval(logits)
    return logits


def evaluate(cache: Any) -> None:
    """Evaluate the keys and values of all layers where they are stored."""
    ours = {id(layer.rows.pool): layer.rows.pool for layer in cache if hasattr(layer, "rows")}
    theirs = [array for layer in cache if not hasattr(layer, "rows") for array in (layer.keys, layer.values)]
    mx.eval([pool.buffers for pool in ours.values()], theirs)


def contiguous(length: int, seed: int = 0, shape: Shape = SMOLLM2) -> list[KVCache]:
    """Make mlx-lm's own caches, filled with `length` random tokens."""
    filled: list[KVCache] = fill([KVCache() for _ in range(shape.layers)], length, seed, shape=shape)
    return filled


def attention(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Update every layer and attend, as a model does. For a batch, histories are not gathered."""
    rows = getattr(cache[0], "rows", None) if queries.shape[0] > 1 else None
    n, outputs = queries.shape[2], list[mx.array]()
    if rows:
        rows._begin(n, is_called=True)
    mask = cache[0].make_mask(n, return_array=False, window_size=getattr(cache[0], "max_size", None))
    for layer in cache:
        history = layer.update_and_fetch(keys, values)
        outputs.append(_attend(queries, history[0], history[1], layer, queries.shape[3] ** -0.5, mask))
    if rows:
        rows.finish()
    mx.eval(outputs)
    return outputs[-1]


class Prepared:
    """A layer cache that returns prepared keys and values: the cost of attention without a cache."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values
        self.offset = keys.shape[2] - 1

    def make_mask(self, *given: Any, **more: Any) -> None:
        """Return None: a single token sees all keys."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        # Makes the model compute its new keys and values, although they are not stored.
        history = mx.depends([self.keys, self.values], [keys, values])
        return history[0], history[1]


def prepared(length: int, shape: Shape = SMOLLM2) -> list[Prepared]:
    """Make a history of `length` tokens for each layer, in separate arrays."""
    cache = []
    for seed in range(shape.layers):
        _, keys, values = arrays(length, seed, shape=shape)
        cache.append(Prepared(keys, values))
    return cache
