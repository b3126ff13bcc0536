"""The errors of this package.

After any of them the cache is usable and unchanged.
"""

from __future__ import annotations

from os import PathLike


class CacheError(Exception):
    """The base of this package's errors. Raised itself for calls in the wrong order."""


class CacheFullError(CacheError):
    """The cache has too few free cells.

    Attributes:
        needed: the number of cells that the call needs.
        free: the number of cells that it could use.
        capacity: the number of cells in the cache.
        hint: how to make room, or why that is not possible.
    """

    def __init__(self, needed: int, free: int, capacity: int, hint: str = "") -> None:
        self.needed = needed
        self.free = free
        self.capacity = capacity
        self.hint = hint
        message = f"{needed} cells needed, {free} free of a capacity of {capacity}"
        super().__init__(f"{message}: {hint}" if hint else message)

    def __reduce__(self) -> tuple[type, tuple[int, int, int, str]]:
        return type(self), (self.needed, self.free, self.capacity, self.hint)


class NotSupportedError(CacheError):
    """The cache cannot do this exactly, because of its configuration or its current contents."""


class RanksDisagreeError(CacheError):
    """The ranks of one model were about to make different changes, or one of them could not make its change.

    Ranks that fail by themselves raise their own error, the others this one. Nothing has changed then.

    Attributes:
        told: one text per rank: its intended change, its error, or the tokens that it was fed.
    """

    def __init__(self, message: str, told: tuple[str, ...] = ()) -> None:
        self.told = told
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.told)


class CacheFileError(CacheError):
    """A file cannot be written or read, or its contents do not fit here.

    Attributes:
        path: the file.
        reason: the problem with it.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[str | PathLike[str], str]]:
        return type(self), (self.path, self.reason)
