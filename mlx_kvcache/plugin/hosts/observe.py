"""Detects when a model's call begins and ends.

A cache alone cannot: a recurrent layer does not report how many tokens it read, some layers are
never written, and an exception leaves no trace. While caches of this package exist, the model's class
is replaced by a subclass that overrides `__call__`. Calls with such a cache run inside a forward;
other calls are unchanged. While the model is attached, the subclass overrides `make_cache` too.

`PerModel` keeps a value for each model until the model is freed. Garbage collection can run a finalizer
at any time and in any thread, even one that holds a lock, so a finalizer that waits for a lock can deadlock
the process. Finalizers of the plug-in therefore take no locks: they remove an entry, which is atomic, and
then apply the state that the remaining entries ask for. Code that adds an entry applies it too and checks
again afterwards, so the last check sees all entries.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, cast

import mlx.nn as nn

from ...errors import NotSupportedError

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


Call = Callable[..., Any]
Maker = Callable[[nn.Module], Any]
"""Makes a model's cache list."""


class Caller(Protocol):
    """Runs a model's calls for the layers of one cache list."""

    def run(self, model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model's call inside a forward of its tokens and return its output."""


class Observable:
    """Base class of the entries of a cache list. A model's call with one of them is recognized."""

    rows: Caller

    def recurrent_places(self) -> Sequence[Any]:
        """The recurrent layers in this entry, as `Place`s of `mixers.py`."""
        return ()

    def called_by(
        self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the call of a module that is handed this entry, and return its output."""
        return call(*args, **kwargs)


_ORIGINAL = "_original_of_mlx_kvcache"
"""Attribute of the subclasses made here: the class that each replaces."""

_users: PerModel[dict[object, Maker | None]] = PerModel(dict)
"""For each model, the `make_cache` argument of every active `observe`."""
_subclasses: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Maker | None, type]] = (
    weakref.WeakKeyDictionary()
)
_asking = threading.local()


def observe(model: nn.Module, make_cache: Maker | None = None) -> Callable[[], None]:
    """Run the model's calls with this package's caches inside forwards until the result is called.

    The returned function is safe in finalizers: it takes no lock, does not keep the model alive, and
    may be called twice.

    Args:
        make_cache: replaces the model's own `make_cache` meanwhile; see `own_make_cache`.

    Raises:
        NotSupportedError: the model's class cannot be replaced by a subclass.
    """
    user, users = object(), _users.of(model)
    users[user] = make_cache
    try:
        _set_class(model, users)
    except TypeError as error:
        users.pop(user, None)
        raise NotSupportedError(
            f"cannot observe calls of {type(model).__name__}: its class cannot be replaced by a subclass: "
            f"{error}"
        ) from error
    return functools.partial(_leave, weakref.ref(model), user)


def is_cache(value: Any) -> bool:
    """Whether a value is a cache list of this package."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Observable)


@contextmanager
def own_make_cache(model: nn.Module) -> Iterator[Callable[[], Any] | None]:
    """Yield the model's own `make_cache`, or None. Inside, this thread sees only that one."""
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
        _set_class(model, users)


def _set_class(model: nn.Module, users: dict[object, Maker | None]) -> None:
    """Give the model the class that its users need. A class set by other code counts as its own."""

    def wanted(cls: type[nn.Module]) -> type[nn.Module]:
        original = vars(cls).get(_ORIGINAL, cls)
        makers = list(users.values())
        return _subclass(original, next(filter(None, makers), None)) if makers else original

    replace_class(model, wanted)


def replace_class(module: nn.Module, wanted: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Give a module the class that `wanted` returns for its present one."""
    while (cls := wanted(type(module))) is not type(module):
        # Another thread may change what is wanted in between, so ask again.
        module.__class__ = cls


def _subclass(cls: type[nn.Module], maker: Maker | None) -> type[nn.Module]:
    """Return the subclass of `cls` for `maker`. It is cached weakly: only its models keep it alive."""
    known = _subclasses.setdefault(cls, weakref.WeakValueDictionary())
    made: type[nn.Module] | None = known.get(maker)
    if made is None:
        made = known[maker] = _made(cls, maker)
    return made


def _made(cls: type[nn.Module], maker: Maker | None) -> type[nn.Module]:
    original = cls.__call__

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = next(filter(is_cache, (*args, *kwargs.values())), None)
        if cache is None:
            return original(self, *args, **kwargs)
        return cache[0].rows.run(self, functools.partial(original, self), args, kwargs)

    own = {"make_cache": _MakeCache(maker)} if maker else {}
    made = subclassed(cls, {"__call__": call, **own})
    for descriptor in own.values():
        descriptor.owner = weakref.ref(made)
    return made


def subclassed(cls: type[nn.Module], names: Mapping[str, Any]) -> type[nn.Module]:
    """Return a subclass that looks like `cls`, with these attributes. Copies of its instances get `cls`.

    Raises:
        TypeError: `cls` does not define `__call__`.
    """
    if not any("__call__" in vars(base) for base in cls.__mro__):
        raise TypeError("it does not define __call__")
    original_reduce = cls.__reduce_ex__

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Copies have no caches, so they get the original class, unless a user derived from this one."""
        reduced: Any = original_reduce(self, protocol)
        if type(self) is not made or isinstance(reduced, str):
            return reduced
        constructor, args, *rest = reduced
        if constructor is copyreg.__newobj__ and args == (made,):  # type: ignore[attr-defined]
            # Pickle accepts `__newobj__` only with the object's own class; a model is a dict.
            constructor, args = copyreg._reconstructor, (made, dict, ())  # type: ignore[attr-defined]
        return constructor, tuple(cls if arg is made else arg for arg in args), *rest

    about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, _ORIGINAL: cls}
    made = type(cls.__name__, (cls,), {**names, "__reduce_ex__": reduce, **about})
    return made


class _MakeCache:
    """Descriptor for `make_cache` of an attached model, also if the instance sets its own.

    Attributes:
        owner: the class that defines it.
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
