"""Keeps a value for each model until the model is freed.

Garbage collection can run a finalizer at any time and in any thread, even one that holds a lock, so a
finalizer that waits for a lock can deadlock. Finalizers of the plug-in therefore take no locks: they remove
an entry, which is atomic, and then apply the state that the remaining entries ask for. Code that adds an
entry applies it too and checks again afterwards, so the last check sees all entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import mlx.nn as nn

T = TypeVar("T")


class PerModel(Generic[T]):
    """A mapping from models to values that drops a value when its model is freed. Takes no locks.

    Models are dicts and cannot be hashed, so the key is the address. A weak reference tells a model from a
    freed one that had the same address.

    Args:
        make: makes the value of a model that has none yet.
        gone: called after a model that had a value is freed.
    """

    def __init__(self, make: Callable[[], T], gone: Callable[[], None] = lambda: None) -> None:
        self._make = make
        self._gone = gone
        self._entries: dict[int, tuple[weakref.ref[nn.Module], T]] = {}

    def __bool__(self) -> bool:
        """Whether any model has a truthy value."""
        return any(value for _, value in list(self._entries.values()))

    def get(self, model: nn.Module) -> T | None:
        weakly, value = self._entries.get(id(model), (None, None))
        return value if weakly and weakly() is model else None

    def of(self, model: nn.Module) -> T:
        """Return the model's value, which is made if there is none."""
        key = id(model)
        known = self._entries.get(key)
        if known is None or known[0]() is not model:
            entry = weakref.ref(model, lambda _: self._died(key)), self._make()
            known = self._entries.setdefault(key, entry)
            if known[0]() is not model:
                known = self._entries[key] = entry
        return known[1]

    def _died(self, key: int) -> None:
        # Python calls this before another object can reuse the address.
        self._entries.pop(key, None)
        self._gone()
