"""Describes a host: the library that a model comes from, and what differs between such libraries.

`mlx_lm.py` and `mlx_vlm.py` each hold the description of one. Hosts are imported when a model of theirs is
met, so one that is not installed costs nothing.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, TypeVar

import mlx.core as mx

from ...arguments import class_of
from ...errors import NotSupportedError

T = TypeVar("T")

CLASSES = ("KVCache", "QuantizedKVCache", "RotatingKVCache", "ChunkedKVCache", "ArraysCache", "CacheList")
"""Classes of caches that each host has, under these names."""


@dataclass(frozen=True, eq=False)
class Host:
    """What the plug-in knows about a library of models.

    Attributes:
        name: its name on PyPI.
        package: the package that it installs.
        versions: the versions that are known to work, for messages.
        functions: functions that the plug-in calls or replaces, with the parameters that it expects.
        not_answered: public attributes of the host's caches that entries need not define.
        commands: the commands of the host that `python -m mlx_kvcache.plugin` can run.
        tools: the module in `plugin/` that replaces functions of the host's tools.
        inner: the attribute of a whole model that holds its language model; None if models are not nested.
    """

    name: str
    package: str
    versions: str
    functions: Mapping[str, str]
    commands: tuple[str, ...]
    tools: str
    not_answered: frozenset[str] = frozenset()
    inner: str | None = None
    _entries: dict[type, type] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.name)

    @cached_property
    def caches(self) -> ModuleType:
        """The module of the host's cache classes."""
        return importlib.import_module(f"{self.package}.models.cache")

    @cached_property
    def attention(self) -> Callable[..., Any]:
        """The function by which the host's models compute attention."""
        found: Callable[..., Any] = importlib.import_module(
            f"{self.package}.models.base"
        ).scaled_dot_product_attention
        return found

    @cached_property
    def make_prompt_cache(self) -> Callable[..., Any]:
        """The host's own function, even while it is replaced."""
        found: Callable[..., Any] = self.caches.make_prompt_cache
        return found

    @cached_property
    def keeps_numbers_apart(self) -> bool:
        """Whether the numbers of a cache are in its `meta_state`, and only its arrays in its `state`."""
        return hasattr(self.caches.KVCache, "meta_state")

    def language_model(self, model: Any) -> Any:
        """The part of a model that is called with a cache list: the model itself if it is not nested."""
        return getattr(model, self.inner, model) if self.inner else model

    def state(self, name: str, state: Any) -> Any:
        """The `state` of the host's class `name`, from that of mlx-lm 0.32."""
        return _arrays_of(name, state) if self.keeps_numbers_apart else state

    def meta_state(self, name: str, state: Any) -> Any:
        """The `meta_state` of the host's class `name`, from a state of mlx-lm 0.32; "" if it has none.

        Raises:
            NotSupportedError: the host could not tell from it at which position a chunk ends.
        """
        return _numbers_of(name, state) if self.keeps_numbers_apart else ""

    def entry(self, ours: type[T]) -> type[T]:
        """The subclass of an entry that is also an instance of the host's class of the same name.

        Tools ask for that class to decide what they may do. What ours does not define is hidden, because the
        host's own methods find none of the attributes that they need.
        """
        known = self._entries.get(ours)
        if known is None:
            theirs = getattr(self.caches, ours.__name__)
            names: dict[str, Any] = dict.fromkeys(self.not_answered, _Absent())
            if not hasattr(theirs, "make_mask"):
                # Models make a mask of another kind if there is no such method.
                names["make_mask"] = _Absent()
            names |= {"__module__": ours.__module__, "__qualname__": ours.__qualname__}
            if self.keeps_numbers_apart:
                names["meta_state"] = property(
                    lambda own: self.meta_state(type(own).__name__, own.saved_state)
                )
            known = type(ours.__name__, (ours, theirs), names)
            self._entries[ours] = known
        return known

    def check(self, classes: Sequence[tuple[Any, type]]) -> None:
        """Compare the installed version with what the plug-in supports.

        Args:
            classes: caches of the host, each with the entry that stands in for it.

        Raises:
            NotSupportedError: they differ.
        """
        for path, parameters in self.functions.items():
            function, known = self._found(path), parameters.split()
            if getattr(function, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
                # Another model is attached.
                continue
            found = list(inspect.signature(function).parameters) if callable(function) else []
            if found[: len(known)] != known:
                raise self._unknown(f"{path} takes {found}, expected {known}")
        for theirs, ours in classes:
            public = {name for name in dir(theirs) if not name.startswith("_")}
            extra = sorted(public - set(dir(ours)) - self.not_answered)
            if extra:
                raise self._unknown(f"{class_of(theirs)} has {', '.join(extra)}")

    def _found(self, path: str) -> Any:
        """A function or method in the package; None if there is none."""
        found: Any = importlib.import_module(self.package)
        for name in path.split("."):
            # A package may have a function of the name of its module.
            is_module = isinstance(found, ModuleType) and hasattr(found, "__path__")
            inner = f"{found.__name__}.{name}" if is_module else ""
            if inner and importlib.util.find_spec(inner):
                found = importlib.import_module(inner)
            else:
                found = getattr(found, name, None)
        return found

    def _unknown(self, difference: str) -> NotSupportedError:
        return NotSupportedError(
            f"{self.name} {self.version} is not supported: {difference}. Use {self.name} {self.versions}, or "
            "a newer version of mlx_kvcache"
        )


class _Absent:
    """Hides an attribute that a class inherits."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} of mlx_kvcache has no such attribute")


def _arrays_of(name: str, state: Any) -> Any:
    """The arrays in a state of mlx-lm 0.32, which are a state of mlx-lm 0.31 and of mlx-vlm."""
    if name == "CacheList":
        return [_arrays_of(child, own) for own, child in state]
    if not isinstance(state, tuple):
        # Of a batch, or of a quantized window: arrays only.
        return state
    return state[0] if name == "ArraysCache" else state[:2]


def _numbers_of(name: str, state: Any) -> Any:
    """The numbers in a state of mlx-lm 0.32, as a `meta_state` of mlx-lm 0.31 and of mlx-vlm."""
    if name == "CacheList":
        return [child for _, child in state], [_numbers_of(child, own) for own, child in state]
    if not isinstance(state, tuple) or name in ("ArraysCache", "KVCache"):
        return ""
    numbers = state[2:]
    if name == "RotatingKVCache":
        offset, keep, max_size, index = numbers
        numbers = keep, max_size, offset, index
    elif name == "ChunkedKVCache":
        numbers = numbers[1:]
        if numbers[1]:
            raise NotSupportedError(
                f"cannot describe chunks that start at position {numbers[1]}: caches of this host take the "
                "number of keys for the position of the next token; save with format='mlx_kvcache', or use "
                "mlx-lm 0.32"
            )
    return tuple(map(str, numbers))


def name_of(module: str) -> str:
    """The short name of a model, from the module that defines it, such as mlx_vlm.models.llama.language."""
    return next((part for part in reversed(module.split(".")) if part != "language"), module)


def found_logits(output: Any) -> mx.array | None:
    """Return the logits in a model's output, or None if it has none."""
    logits = output if isinstance(output, mx.array) else getattr(output, "logits", None)
    return logits if isinstance(logits, mx.array) else None


def logits_of(model: Any, inputs: mx.array, cache: Any, **more: Any) -> mx.array:
    """Call a model and return its logits. Raises NotSupportedError if it returns none."""
    output = model(inputs, cache=cache, **more)
    logits = found_logits(output)
    if logits is None:
        raise NotSupportedError(
            f"{type(model).__module__} returned a {type(output).__name__}; expected the logits as an array, "
            "or an object with the attribute .logits"
        )
    return logits


def joined(outputs: Sequence[Any], join: Callable[[list[mx.array]], mx.array]) -> Any:
    """Combine the outputs of calls for single rows, which have the same structure, into one for all rows.

    Args:
        join: combines the rows' arrays into one.

    Raises:
        NotSupportedError: an output holds something other than arrays, lists of arrays and None.
    """
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, mx.array):
        return join(list(outputs))
    if type(first) in (list, tuple):
        return type(first)(joined(parts, join) for parts in zip(*outputs, strict=True))
    if found_logits(first) is None or not hasattr(first, "__dict__"):
        raise NotSupportedError(
            f"cannot join the outputs of several rows: they contain a {type(first).__name__}; supported are "
            "arrays, lists, tuples, None, and objects with .logits"
        )
    whole = copy.copy(first)
    for name in vars(first):
        # The class may be frozen.
        object.__setattr__(whole, name, joined([getattr(output, name) for output in outputs], join))
    return whole
