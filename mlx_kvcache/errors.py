"""What can go wrong. After any of these the cache is usable and unchanged."""

from __future__ import annotations

from os import PathLike


class CacheError(Exception):
    """Base of this package's errors; raised itself when calls come in the wrong order."""


class CacheFullError(CacheError):
    """There is no room for what must be held.

    Attributes:
        needed: cells that the call had to take.
        free: cells that it could have taken.
        capacity: cells of the whole room.
        hint: what can be done, or why nothing can.
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
    """The cache, as it was built or with what it holds now, cannot do this exactly."""


class RanksDisagreeError(CacheError):
    """Processes that run one model together were about to do different things, or not all of them could.

    It is raised on every rank but those that raise an error of their own, before anything has changed.

    Attributes:
        told: what each rank has told about itself, by rank.
    """

    def __init__(self, message: str, told: tuple[str, ...] = ()) -> None:
        self.told = told
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.told)


class CacheFileError(CacheError):
    """A file cannot be written or read, or what is in it cannot be used here.

    Attributes:
        path: which file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[str | PathLike[str], str]]:
        return type(self), (self.path, self.reason)
