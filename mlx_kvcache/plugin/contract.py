"""Whether the mlx-lm that is installed is one that this plug-in knows."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import mlx_lm
from mlx_lm.models import cache as mlx_lm_cache

from ..arguments import class_of
from ..errors import NotSupportedError
from .layers.arrays import ArraysCache
from .layers.keyvalue import ChunkedKVCache, KVCache, RotatingKVCache
from .layers.nested import CacheList

_FUNCTIONS = {
    "models.cache.make_prompt_cache": ["model", "max_kv_size"],
    "models.cache.save_prompt_cache": ["file_name", "cache", "metadata"],
    "models.cache.LRUPromptCache.fetch_nearest_cache": ["self", "model", "tokens"],
    "models.cache.LRUPromptCache.insert_cache": ["self", "model", "tokens", "prompt_cache", "cache_type"],
    "models.cache.PromptTrie.search": ["self", "model", "tokens"],
    "models.cache.PromptTrie.get": ["self", "model", "tokens"],
    "models.cache.PromptTrie.add": ["self", "model", "tokens", "value"],
    "models.cache.PromptTrie.pop_prefixes": ["self", "model", "tokens"],
    "models.base.create_attention_mask": ["h", "cache", "window_size", "return_array"],
    "models.base.scaled_dot_product_attention": [
        "queries", "keys", "values", "cache", "scale", "mask", "sinks",
    ],
}  # fmt: skip
"""What the plug-in calls or stands in for, with the parameters that it knows."""

_CLASSES = (
    (mlx_lm_cache.KVCache(), KVCache),
    (mlx_lm_cache.RotatingKVCache(8), RotatingKVCache),
    (mlx_lm_cache.ChunkedKVCache(8), ChunkedKVCache),
    (mlx_lm_cache.ArraysCache(1), ArraysCache),
    (mlx_lm_cache.CacheList(mlx_lm_cache.KVCache()), CacheList),
)
"""mlx-lm's caches, and what answers for them."""

_NOT_ANSWERED = {"from_state", "step"}
"""Loading a file makes mlx-lm's own caches, and how buffers grow is nobody's business."""


def check_contract() -> None:
    """Raise NotSupportedError if mlx-lm asks for something that this plug-in does not know."""
    for path, known in _FUNCTIONS.items():
        found = _parameters(path)
        if found[: len(known)] != known:
            raise _unknown(f"{path} takes {found}, expected {known}")
    for theirs, ours in _CLASSES:
        public = {name for name in dir(theirs) if not name.startswith("_")}
        extra = sorted(public - set(dir(ours)) - _NOT_ANSWERED)
        if extra:
            raise _unknown(f"{class_of(theirs)} has {', '.join(extra)}")


def _parameters(path: str) -> list[str]:
    """The parameters of a function or method below `mlx_lm`; none where it is missing."""
    module, _, rest = path.partition(".")
    package, _, rest = rest.partition(".")
    found: Any = importlib.import_module(f"mlx_lm.{module}.{package}")
    for name in rest.split("."):
        found = getattr(found, name, None)
    return list(inspect.signature(found).parameters) if callable(found) else []


def _unknown(what: str) -> NotSupportedError:
    return NotSupportedError(
        f"mlx-lm {mlx_lm.__version__} is not one that this plug-in knows: {what}. Use mlx-lm 0.32.2, or a "
        "newer version of mlx_kvcache"
    )
