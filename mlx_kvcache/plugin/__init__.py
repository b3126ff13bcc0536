"""The plug-in for mlx-lm: its models and tools on this package's caches."""

from .attach import attach, detach
from .holdings import Holding, holdings
from .many import Generated, Many, generate_many
from .pooled import make_session_pool
from .prompt_cache import PromptCache, make_prompt_cache

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
]
