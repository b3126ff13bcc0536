"""A KV cache for MLX that can rewind, share and shift."""

from .arrays.rope import rope_shift
from .attention import attention
from .batch import Batch, CacheConfig, CausalOptions
from .caches.base import Cache, slide
from .caches.causal import CausalCache
from .errors import CacheError, CacheFullError, NotSupportedError

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Cache",
    "CacheConfig",
    "CacheError",
    "CacheFullError",
    "CausalCache",
    "CausalOptions",
    "NotSupportedError",
    "attention",
    "rope_shift",
    "slide",
]
