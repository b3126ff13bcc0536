"""State that lives as long as a model.

Garbage collection runs finalizers at any moment and in any thread, also in one that holds a lock, so
a finalizer that waits for a lock can stop the process. No finalizer of the plug-in takes one: it
removes an entry, which is atomic, and then puts things as the remaining entries say. Whoever adds an
entry does the same, and looks again afterwards, so that the last one to look sees all entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import mlx.nn as nn

T = TypeVar("T")


class PerModel(Generic[T]):
    """A value for each model, until the model dies. Takes no locks.

    Models are dicts, which have no hash. They are known by address, and a weak reference tells a
    model from a dead one that was at the same address.

    Args:
        make: makes the value of a model that has none yet.
        gone: called after a model has died that had a value.
    """

    def __init__(self, make: Callable[[], T], gone: Callable[[], None] = lambda: None) -> None:
        self._make = make
        self._gone = gone
        self._entries: dict[int, tuple[weakref.ref[nn.Module], T]] = {}

    def __bool__(self) -> bool:
        """Whether any model has a value that counts as true."""
        return any(value for _, value in list(self._entries.values()))

    def get(self, model: nn.Module) -> T | None:
        """The model's value, or None if it has none."""
        weakly, value = self._entries.get(id(model), (None, None))
        return value if weakly and weakly() is model else None

    def of(self, model: nn.Module) -> T:
        """The model's value, which is made first if it has none."""
        key = id(model)
        known = self._entries.get(key)
        if known is None or known[0]() is not model:
            entry = weakref.ref(model, lambda _: self._died(key)), self._make()
            known = self._entries.setdefault(key, entry)
            if known[0]() is not model:
                known = self._entries[key] = entry
        return known[1]

    def _died(self, key: int) -> None:
        # Python calls this before another object can get the address.
        self._entries.pop(key, None)
        self._gone()
