"""Finds the modules that compute recurrent states ("mixers"), and computes states from their noted inputs.

A state is a function of the state before and of what its mixers were called with. So whoever notes the
inputs of the newest tokens can call the mixers again on some of them, from an earlier state, without
running the rest of the model. Mixers are found by watching which modules of the model are handed a
recurrent entry: the innermost such module reads and writes it. Two modules may share an entry; they are
then called one after the other.

While caches of this package exist, the class of each mixer is replaced by a subclass, as `observe.py` does
with the model's, that passes calls on to the entry.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...caches.states import Arrays
from ...errors import CacheError
from .layout import host_of
from .observe import Call, Observable, PerModel, replace_class, subclassed


class _Role(Enum):
    """What an argument is that differs from call to call."""

    ENTRY = "the entry"
    TOKENS = "an array with one column for each token"
    OFFSET = "the offset of the first token"
    MASK = "a mask for attention, which recurrences ignore"


class Frame(NamedTuple):
    """The arguments of a call.

    Attributes:
        names: the names of those that are passed by name, which come last.
        roles: for each argument its `_Role`, or the value itself.
    """

    names: tuple[str, ...]
    roles: tuple[Any, ...]

    def arguments(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return other values for the arguments as positional ones and those by name."""
        first = len(values) - len(self.names)
        return tuple(values[:first]), dict(zip(self.names, values[first:], strict=True))


class Place(NamedTuple):
    """A recurrent layer within an entry that a module is handed.

    Attributes:
        leaf: its index among the model's leaves.
        slots: its number of state arrays.
        child: its index in a `CacheList` of `size` layers, or None if it is the entry itself.
    """

    leaf: int
    slots: int
    child: int | None = None
    size: int = 0


class _Mixer(NamedTuple):
    """A module that reads and writes a recurrent layer.

    Attributes:
        module: weak, because a pool does not keep its model alive.
        frames: the arguments of its calls with one token (False) and with several (True).
    """

    module: weakref.ref[nn.Module]
    frames: dict[bool, Frame]


class Mixers:
    """The modules that compute one recurrent layer's states, in the order of their calls.

    Args:
        place: the layer.
        caches: the module of the host's cache classes.

    Attributes:
        modules: the modules.
    """

    def __init__(self, place: Place, caches: ModuleType) -> None:
        self.place = place
        self._caches = caches
        self.modules: list[_Mixer] = []

    @property
    def is_nested(self) -> bool:
        """Whether the modules also read other layers, so that their calls cannot be split."""
        return self.place.child is not None

    @property
    def uses_offset(self) -> bool:
        """Whether the states contain the positions of tokens."""
        return any(_Role.OFFSET in mixer.frames[True].roles for mixer in self.modules)

    def index(self, module: nn.Module) -> int | None:
        """The index of a module, or None if it is not one of these."""
        for index, mixer in enumerate(self.modules):
            if mixer.module() is module:
                return index
        return None

    def inputs(
        self, index: int, n: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[mx.array] | None:
        """Return what must be noted of a call to compute its states again: arrays (B, n, ...).

        Returns None if the call differs from those of the trial, so that it cannot be repeated.
        """
        frame, inputs = self.modules[index].frames[n > 1], []
        if len(args) + len(kwargs) != len(frame.roles) or tuple(kwargs) != frame.names:
            return None
        for value, role in zip((*args, *kwargs.values()), frame.roles, strict=True):
            if role is _Role.TOKENS:
                if not _by_token(value, n):
                    return None
                inputs.append(value)
            elif role is _Role.OFFSET:
                inputs.append(_positions(value, n))
            elif not isinstance(role, _Role) and (isinstance(value, mx.array) or value != role):
                return None
        return inputs

    def pieces(
        self, index: int, edges: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield the arguments of a call in pieces.

        Args:
            edges: the columns at which the pieces begin, and the number of columns.
        """
        frame = self.modules[index].frames[edges[-1] > 1]
        for begin, end in itertools.pairwise(edges):
            values = []
            for value, role in zip((*args, *kwargs.values()), frame.roles, strict=True):
                if role is _Role.TOKENS:
                    values.append(value[:, begin:end])
                else:
                    values.append(value + begin if role is _Role.OFFSET else value)
            yield frame.arguments(values)

    def replay(self, arrays: Arrays, inputs: Sequence[mx.array]) -> Arrays:
        """Return the layer's arrays after some tokens.

        Args:
            arrays: the arrays before them, or ().
            inputs: for each module in turn what `inputs` returned for these tokens.
        """
        scratch = self._caches.ArraysCache(self.place.slots)
        if arrays:
            scratch.cache = list(arrays)
        n, rest = inputs[0].shape[1], iter(inputs)
        for weakly, frames in self.modules:
            module, frame = weakly(), frames[n > 1]
            if module is None:
                raise CacheError(
                    "the model of this prompt cache has been freed, so recurrent states cannot be computed "
                    "again; keep a reference to the model while you use the cache"
                )
            args, kwargs = frame.arguments([self._argument(role, scratch, rest) for role in frame.roles])
            module(*args, **kwargs)
        return tuple(scratch.cache)

    def _argument(self, role: Any, scratch: Any, inputs: Iterator[mx.array]) -> Any:
        if role is _Role.ENTRY:
            return scratch if self.place.child is None else self._list_with(scratch)
        if role is _Role.TOKENS:
            return next(inputs)
        if role is _Role.OFFSET:
            return int(next(inputs)[0, 0].item())  # type: ignore[arg-type]
        return None if role is _Role.MASK else role

    def _list_with(self, scratch: Any) -> Any:
        """A `CacheList` with the layer in its place. The module may write keys and values to the others."""
        layers: list[Any] = [self._caches.KVCache() for _ in range(self.place.size)]
        assert self.place.child is not None
        layers[self.place.child] = scratch
        return self._caches.CacheList(*layers)


def joined_outputs(outputs: Sequence[Any]) -> Any:
    """Join the outputs of a call's pieces: arrays (B, n, ...), or tuples of them."""
    if isinstance(outputs[0], mx.array):
        return mx.concatenate(list(outputs), axis=1)
    return type(outputs[0])(joined_outputs(own) for own in zip(*outputs, strict=True))


class _Call(NamedTuple):
    """A call of a module that was handed a recurrent layer."""

    place: Place
    module: nn.Module
    frame: Frame


class _Recorder(threading.local):
    """What this thread records: its calls, and for each call under way the layers that it passed on."""

    calls: list[_Call] | None = None
    passed_on: list[set[int]]


_recorder = _Recorder()
_users: PerModel[dict[object, list[nn.Module]]] = PerModel(dict)
"""For each model, the modules that each active `watch` needs to see."""
_subclasses: dict[type, type] = {}
_originals: dict[type, type] = {}
"""The classes that those in `_subclasses` replace."""


def find(model: nn.Module, run: Callable[[int], None]) -> dict[int, Mixers]:
    """Find the mixers of a model by running it.

    Args:
        run: calls the model with the next 2 and then the next 1 of 3 tokens of an empty cache.

    Returns:
        The mixers of each recurrent layer, by the index of its leaf. Layers are left out if their modules
        cannot be watched, or are called in a way that cannot be repeated.
    """
    inner = [module for module in model.modules() if module is not model and module.children()]
    leave = watch(model, inner)
    try:
        calls = []
        for n in (2, 1):
            with _recorded() as own:
                run(n)
            calls.append(own)
    finally:
        leave()
    caches, found = host_of(model).caches, dict[int, Mixers]()
    for first, second in zip(*calls, strict=False):
        shapes = [
            (call.place, id(call.module), call.frame.names, len(call.frame.roles)) for call in (first, second)
        ]
        if shapes[0] != shapes[1]:
            return {}
        own_mixers = found.setdefault(first.place.leaf, Mixers(first.place, caches))
        frames = dict(zip((True, False), _compared(first.frame, second.frame), strict=True))
        own_mixers.modules.append(_Mixer(weakref.ref(first.module), frames))
    return found if len(calls[0]) == len(calls[1]) else {}


def watch(model: nn.Module, modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Pass calls of these modules on to their entries until the result is called.

    The returned function is safe in finalizers: it takes no lock and may be called twice. Modules whose
    class cannot be replaced are left as they are.
    """
    user, users = object(), _users.of(model)
    users[user] = list(modules)
    for module in modules:
        with suppress(TypeError):
            _set_class(module, users)
    return functools.partial(_leave, weakref.ref(model), user)


def _leave(weakly: weakref.ref[nn.Module], user: object) -> None:
    model = weakly()
    users = _users.get(model) if model is not None else None
    if users is not None:
        for module in users.pop(user, ()):
            _set_class(module, users)


def _set_class(module: nn.Module, users: Mapping[object, Sequence[nn.Module]]) -> None:
    """Give a module the class that its users need. A class set by other code counts as its own."""

    def wanted(cls: type[nn.Module]) -> type[nn.Module]:
        original = _originals.get(cls, cls)
        is_needed = any(module is needed for own in list(users.values()) for needed in own)
        return _subclass(original) if is_needed else original

    replace_class(module, wanted)


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _subclasses:
        original = cls.__call__

        @functools.wraps(original)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            entry = next(
                (value for value in (*args, *kwargs.values()) if isinstance(value, Observable)), None
            )
            if entry is None:
                return original(self, *args, **kwargs)
            act = functools.partial(original, self)
            if _recorder.calls is not None:
                return _record(entry, self, act, args, kwargs)
            return entry.called_by(self, act, args, kwargs)

        made = subclassed(cls, {"__call__": call})
        _originals[made] = cls
        _subclasses[cls] = made
    return _subclasses[cls]


@contextmanager
def _recorded() -> Iterator[list[_Call]]:
    _recorder.calls, _recorder.passed_on = [], []
    try:
        yield _recorder.calls
    finally:
        _recorder.calls = None


def _record(
    entry: Observable, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a module and note the call for those layers of the entry that no module inside it is handed."""
    places = entry.recurrent_places()
    for outer in _recorder.passed_on:
        outer.update(place.leaf for place in places)
    passed_on: set[int] = set()
    _recorder.passed_on.append(passed_on)
    output = call(*args, **kwargs)
    _recorder.passed_on.pop()
    n = _tokens(args, kwargs)
    assert _recorder.calls is not None
    for place in places:
        if place.leaf not in passed_on and n:
            _recorder.calls.append(_Call(place, module, _frame(args, kwargs, n)))
    return output


def _frame(args: Sequence[Any], kwargs: Mapping[str, Any], n: int) -> Frame:
    def role(value: Any) -> Any:
        if isinstance(value, Observable):
            return _Role.ENTRY
        return _Role.TOKENS if _by_token(value, n) else value

    return Frame(tuple(kwargs), tuple(map(role, (*args, *kwargs.values()))))


def _compared(first: Frame, second: Frame) -> tuple[Frame, Frame]:
    """Recognize masks, and numbers that are the position of the first token, which is 0 and then 2."""
    roles: tuple[list[Any], list[Any]] = [], []
    for a, b in zip(first.roles, second.roles, strict=True):
        role = None
        if isinstance(a, str):
            role = _Role.MASK
        elif (type(a), a, type(b), b) == (int, 0, int, 2):
            role = _Role.OFFSET
        roles[0].append(role or a)
        roles[1].append(role or b)
    return first._replace(roles=tuple(roles[0])), second._replace(roles=tuple(roles[1]))


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of columns of the first array among the arguments, or 0."""
    arrays = (value for value in (*args, *kwargs.values()) if isinstance(value, mx.array) and value.ndim > 1)
    first = next(arrays, None)
    return first.shape[1] if first is not None else 0


def _by_token(value: Any, n: int) -> bool:
    return isinstance(value, mx.array) and value.ndim >= 2 and value.shape[1] == n


def _positions(offset: Any, n: int) -> mx.array:
    """Positions (B, n) of n tokens from an offset, which is a number or an array (B,)."""
    first = mx.array(offset, mx.int32).reshape(-1, 1)
    return first + mx.arange(n, dtype=mx.int32)
