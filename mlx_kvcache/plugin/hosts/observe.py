"""Knowing when a model's call begins and ends.

Caches alone cannot tell: a pure recurrence never says how many tokens it read, some entries
are never written, and an exception leaves no trace. So while a model has caches of this package,
its class is replaced by a subclass that overrides `__call__`: calls with such a cache run inside
its forward, all others as before. While the model is attached, the subclass has a `make_cache` too.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import mlx.nn as nn

from ...errors import NotSupportedError
from .lifetimes import PerModel

Call = Callable[..., Any]
Maker = Callable[[nn.Module], Any]
"""Makes a model's cache list."""


class Caller(Protocol):
    """What stands behind the layers of a cache list."""

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make the model's call inside a forward of its tokens."""


class Observable:
    """Base of the entries of a cache list, by which a model's call is recognized."""

    rows: Caller


_ORIGINAL = "_original_of_mlx_kvcache"
"""An attribute of the classes that are made here: the class that each takes the place of."""

_users: PerModel[dict[object, Maker | None]] = PerModel(dict)
"""For each model the `make_cache` of every `observe` that is not over, or None."""
_subclasses: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Maker | None, type]] = (
    weakref.WeakKeyDictionary()
)
_asking = threading.local()


def observe(model: nn.Module, make_cache: Maker | None = None) -> Callable[[], None]:
    """Let the model's calls tell its caches when they begin and end, until what is returned is called.

    Finalizers may call that: it takes no lock, does not keep the model alive, and may be called twice.

    Args:
        make_cache: takes the place of the model's own `make_cache` meanwhile; see `own_make_cache`.

    Raises:
        NotSupportedError: the model's class cannot be replaced by a subclass.
    """
    user, users = object(), _users.of(model)
    users[user] = make_cache
    try:
        _dress(model, users)
    except TypeError as error:
        users.pop(user, None)
        raise NotSupportedError(
            f"calls of a {type(model).__name__} cannot be observed, as its class cannot be replaced by a "
            f"subclass: {error}"
        ) from error
    return functools.partial(_leave, weakref.ref(model), user)


def is_cache(value: Any) -> bool:
    """Whether this is a list of this package's layers."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Observable)


@contextmanager
def own_make_cache(model: nn.Module) -> Iterator[Callable[[], Any] | None]:
    """The model's own `make_cache`, if it has one. Inside, this thread gets no other from the model."""
    before, _asking.model = getattr(_asking, "model", None), model
    try:
        yield getattr(model, "make_cache", None)
    finally:
        _asking.model = before


def _leave(weakly: weakref.ref[nn.Module], user: object) -> None:
    model = weakly()
    users = _users.get(model) if model is not None else None
    if model is None or users is None:
        return
    users.pop(user, None)
    if _ORIGINAL in vars(type(model)):
        _dress(model, users)


def _dress(model: nn.Module, users: dict[object, Maker | None]) -> None:
    """Give the model the class that its users need. One that somebody else chose counts as its own."""
    while True:
        cls = type(model)
        original = vars(cls).get(_ORIGINAL, cls)
        makers = list(users.values())
        wanted = _subclass(original, next(filter(None, makers), None)) if makers else original
        if cls is wanted:
            return
        # Another thread may change the users meanwhile, so look again.
        model.__class__ = wanted


def _subclass(cls: type[nn.Module], maker: Maker | None) -> type[nn.Module]:
    """A class like `cls` whose calls run inside forwards. Only models of that class keep it."""
    known = _subclasses.setdefault(cls, weakref.WeakValueDictionary())
    made: type[nn.Module] | None = known.get(maker)
    if made is None:
        made = known[maker] = _made(cls, maker)
    return made


def _made(cls: type[nn.Module], maker: Maker | None) -> type[nn.Module]:
    if not any("__call__" in vars(base) for base in cls.__mro__):
        raise TypeError("it has no __call__")
    original, original_reduce = cls.__call__, cls.__reduce_ex__

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = next(filter(is_cache, (*args, *kwargs.values())), None)
        if cache is None:
            return original(self, *args, **kwargs)
        return cache[0].rows.run(self, functools.partial(original, self), args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Copies have no caches, so they are of the original class; but not those of a user's subclass."""
        reduced: Any = original_reduce(self, protocol)
        if type(self) is not made or isinstance(reduced, str):
            return reduced
        constructor, args, *rest = reduced
        if constructor is copyreg.__newobj__ and args == (made,):  # type: ignore[attr-defined]
            # Pickle takes it for objects of just this class only; a model is a dict.
            constructor, args = copyreg._reconstructor, (made, dict, ())  # type: ignore[attr-defined]
        return constructor, tuple(cls if arg is made else arg for arg in args), *rest

    names: dict[str, Any] = {"__call__": call, "__reduce_ex__": reduce, _ORIGINAL: cls}
    names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if maker:
        names["make_cache"] = _MakeCache(maker)
    made = type(cls.__name__, (cls,), names)
    if maker:
        names["make_cache"].owner = weakref.ref(made)
    return made


class _MakeCache:
    """A model's `make_cache` while it is attached, also of one that has its own as an attribute.

    Attributes:
        owner: the class that has it.
    """

    owner: weakref.ref[type]

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    def __get__(self, model: nn.Module | None, cls: type) -> Any:
        if model is None:
            return self
        if getattr(_asking, "model", None) is not model:
            return functools.partial(self._maker, model)
        if "make_cache" in vars(model):
            return vars(model)["make_cache"]
        own: Any = super(cast(Any, self.owner()), cast(Any, model))
        return own.make_cache

    def __set__(self, model: nn.Module, own: Any) -> None:
        vars(model)["make_cache"] = own

    def __delete__(self, model: nn.Module) -> None:
        del vars(model)["make_cache"]
