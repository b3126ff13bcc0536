"""Finds the host of a model, and reads the model's cache layout from its own cache list.

The layout says for each layer which tokens are visible (full attention, window, chunk) or that it keeps
recurrent states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from itertools import count
from types import ModuleType
from typing import Any

import mlx.nn as nn

from ...arguments import class_of
from ...cells.visibility import Causal, Chunk, Rule, Window
from ...errors import NotSupportedError
from .host import Host
from .mlx_lm import MLX_LM
from .mlx_vlm import MLX_VLM
from .observe import own_make_cache

HOSTS = (MLX_LM, MLX_VLM)


@dataclass(frozen=True)
class Leaf:
    """One cache of a model: keys and values under a visibility rule, or a recurrent layer's states."""

    index: int
    """Its index among all leaves of the model."""
    name: str
    """Its place in the model's cache list, such as "3", or "3[1]" inside a `CacheList`."""
    rule: Rule | None
    """The visibility rule; None for recurrent states."""
    slots: int = 0
    """The number of state arrays; 0 for keys and values."""

    @property
    def layer(self) -> int:
        """The index of its entry in the model's cache list."""
        return int(self.name.partition("[")[0])


Entry = Leaf | tuple["Entry", ...]


@dataclass(frozen=True)
class Layout:
    """The entries of a model's cache list; a `CacheList` is a tuple of entries."""

    entries: tuple[Entry, ...]

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(_leaves(self.entries))

    @cached_property
    def rules(self) -> tuple[Rule | None, ...]:
        """The distinct visibility rules, in order of appearance; None stands for recurrent states."""
        return tuple(dict.fromkeys(leaf.rule for leaf in self.leaves))

    @cached_property
    def is_recurrent(self) -> bool:
        return None in self.rules


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of the model's own cache. Raises NotSupportedError if it is not supported."""
    module, indices, caches = type(model).__module__, count(), host_of(model).caches
    layout = Layout(
        tuple(_read(own, str(i), indices, caches, module) for i, own in enumerate(own_cache(model)))
    )
    if not layout.leaves:
        raise NotSupportedError(f"{module} has no layers that use a cache")
    return layout


def host_of(model: Any) -> Host:
    """Return the host of a model: the one whose package defines its class or the class of its caches.

    A model that makes no caches counts as one of the first host that is installed.

    Raises:
        NotSupportedError: no host is installed.
    """
    found = _defining(type(model).__mro__)
    if found is None:
        with own_make_cache(model) as make_cache:
            found = _defining([type(entry) for entry in make_cache()[:1]] if make_cache else [])
    found = found or next((host for host in HOSTS if host.is_installed), None)
    if found is None:
        names = " or ".join(host.name for host in HOSTS)
        raise NotSupportedError(f"{class_of(model)} needs a host library: install {names}")
    return found


def _defining(classes: Iterable[type]) -> Host | None:
    """Return the host that defines one of these classes."""
    packages = [cls.__module__.partition(".")[0] for cls in classes]
    return next((host for host in HOSTS if host.package in packages), None)


def language_model_of(model: Any) -> Any:
    """Return the part of a model that is called with a cache list: the model itself if it is not nested."""
    return host_of(model).language_model(model)


def own_cache(model: nn.Module) -> list[Any]:
    """Return the host's own cache list for a model, even while the model is attached."""
    with own_make_cache(model) as make_cache:
        return make_cache() if make_cache else [host_of(model).caches.KVCache() for _ in model.layers]


def configuration_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's arguments by name; an empty dict if they are not a dataclass."""
    arguments = getattr(model, "args", None) or getattr(model, "config", None)
    return asdict(arguments) if is_dataclass(arguments) and not isinstance(arguments, type) else {}


def _leaves(entry: Entry) -> Iterator[Leaf]:
    if isinstance(entry, Leaf):
        yield entry
    else:
        for child in entry:
            yield from _leaves(child)


def _read(entry: Any, name: str, indices: Iterator[int], caches: ModuleType, module: str) -> Entry:
    # Subclasses may behave differently, so only exact classes are accepted.
    kind = type(entry)
    if kind is caches.KVCache:
        return Leaf(next(indices), name, Causal())
    if kind is caches.RotatingKVCache and 0 <= entry.keep < entry.max_size:
        return Leaf(next(indices), name, Window(entry.max_size - entry.keep, entry.keep))
    if kind is caches.ChunkedKVCache:
        return Leaf(next(indices), name, Chunk(entry.chunk_size))
    if kind is caches.ArraysCache:
        return Leaf(next(indices), name, None, len(entry.cache))
    if kind is caches.CacheList:
        return tuple(
            _read(own, f"{name}[{i}]", indices, caches, module) for i, own in enumerate(entry.caches)
        )
    raise NotSupportedError(
        f"layer {name} of {module} uses {class_of(entry)}, which is not supported; supported "
        f"are KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache and CacheList of {caches.__name__}"
    )
