"""The plug-in for mlx-lm: its models and tools on this package's caches."""

from .attach import attach, detach
from .prompt_cache import PromptCache, make_prompt_cache

__all__ = ["PromptCache", "attach", "detach", "make_prompt_cache"]
