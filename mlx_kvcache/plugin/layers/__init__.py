"""What mlx-lm sees: one object for each entry of a model's cache list.

The classes are named as mlx-lm's own, and answer `state` like them: files that it writes name
classes, and load again with or without this package.
"""

from .make import entries_of

__all__ = ["entries_of"]
