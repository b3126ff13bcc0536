"""Conversations that are found by their tokens, so that equal beginnings are computed once.

A prefix cache for anything that can rewind and fork. It must not know mlx-lm.
"""

from .pool import Counts, SessionPool
from .session import Session

__all__ = ["Counts", "Session", "SessionPool"]
