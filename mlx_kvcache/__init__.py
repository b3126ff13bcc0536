"""A KV cache for MLX that can rewind, share and shift."""

from .arrays.rope import rope_shift
from .attention import attention
from .batch import Batch, CacheConfig, CausalOptions
from .caches.causal import CausalCache
from .caches.chunked import ChunkedAttentionCache
from .caches.encoder import EncoderCache
from .caches.interface import Cache, slide
from .caches.recurrent import RecurrentCache
from .caches.sliding import SlidingWindowCache
from .caches.wrapper import WrapperCache
from .errors import CacheError, CacheFileError, CacheFullError, NotSupportedError, RanksDisagreeError
from .quantisation import Quantisation

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Cache",
    "CacheConfig",
    "CacheError",
    "CacheFileError",
    "CacheFullError",
    "CausalCache",
    "CausalOptions",
    "ChunkedAttentionCache",
    "EncoderCache",
    "NotSupportedError",
    "Quantisation",
    "RanksDisagreeError",
    "RecurrentCache",
    "SlidingWindowCache",
    "WrapperCache",
    "attention",
    "rope_shift",
    "slide",
]
