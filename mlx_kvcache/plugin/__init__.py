"""Plug-in for mlx-lm and mlx-vlm: runs their models and tools on the caches of this package."""

from .attach import attach, detach
from .pool.inspection import Holding, holdings
from .prompt_cache import PromptCache, make_prompt_cache
from .serving.many import Generated, Many, generate_many
from .serving.sessions import make_session_pool, picture_key

__all__ = [
    "Generated",
    "Holding",
    "Many",
    "PromptCache",
    "attach",
    "detach",
    "generate_many",
    "holdings",
    "make_prompt_cache",
    "make_session_pool",
    "picture_key",
]
