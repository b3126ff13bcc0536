"""A prefix cache: conversations that share a prefix of tokens share its keys and values.

It works with any cache that has the methods of `session.Branch`, and does not depend on mlx-lm.
"""

from .prefix_cache import Counts, SessionPool
from .session import Departure, Session

__all__ = ["Counts", "Departure", "Session", "SessionPool"]
