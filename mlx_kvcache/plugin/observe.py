"""Knowing when a model's call begins and ends.

Caches alone cannot tell: a pure recurrence never says how many tokens it read, some entries
are never written, and an exception leaves no trace. So a model that has caches of this package
gets a class of its own, which differs from the model's in `__call__` only: calls with such a
cache run inside its forward, all others as before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mlx.nn as nn

Call = Callable[..., Any]


class Caller(Protocol):
    """What stands behind the layers of a cache list."""

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make the model's call inside a forward of its tokens."""


class Observable:
    """Base of the entries of a cache list, by which a model's call is recognised."""

    rows: Caller


_lock = threading.Lock()
_observers: dict[int, int] = {}
"""For each observed model, by id: how often `observe` has been called for it."""


def observe(model: nn.Module) -> None:
    """Let the model's calls tell its caches when they begin and end, until `unobserve`."""
    with _lock:
        count = _observers.get(id(model), 0)
        if not count:
            model.__class__ = _observed(type(model))
        _observers[id(model)] = count + 1


def unobserve(model: nn.Module) -> None:
    """Undo one `observe`."""
    with _lock:
        _observers[id(model)] -= 1
        if not _observers[id(model)]:
            del _observers[id(model)]
            model.__class__ = type(model).__mro__[1]


def is_cache(value: Any) -> bool:
    """Whether this is a list of this package's layers."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Observable)


@functools.cache
def _observed(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like `cls` whose calls run inside forwards."""
    original = cls.__call__

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = next(filter(is_cache, (*args, *kwargs.values())), None)
        if cache is None:
            return original(self, *args, **kwargs)
        return cache[0].rows.run(self, functools.partial(original, self), args, kwargs)

    names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)
