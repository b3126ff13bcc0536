"""A KV cache for MLX: many sequences, shared prefixes, removal of tokens, sliding windows, quantization."""

from .attention import attention
from .batch import Batch, CacheConfig, CausalOptions
from .caches.causal import CausalCache, ChunkedAttentionCache, SlidingWindowCache
from .caches.encoder import EncoderCache
from .caches.interface import Cache, slide
from .caches.recurrent import RecurrentCache
from .caches.wrapper import WrapperCache
from .errors import CacheError, CacheFileError, CacheFullError, NotSupportedError, RanksDisagreeError
from .quantization import Quantization
from .rope import rope_shift

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
    "Quantization",
    "RanksDisagreeError",
    "RecurrentCache",
    "SlidingWindowCache",
    "WrapperCache",
    "attention",
    "rope_shift",
    "slide",
]
