"""Reads a model's cache layout from its own cache list, and the logits from its output.

The layout says for each layer which tokens are visible (full attention, window, chunk) or that it keeps
recurrent states. Logits are the returned array, or the `.logits` of the returned object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ...arguments import class_of
from ...cells.visibility import Causal, Chunk, Rule, Window
from ...errors import NotSupportedError
from .observe import own_make_cache


def found_logits(output: Any) -> mx.array | None:
    """Return the logits in a model's output, or None if it has none."""
    logits = output if isinstance(output, mx.array) else getattr(output, "logits", None)
    return logits if isinstance(logits, mx.array) else None


def logits_of(model: Any, inputs: mx.array, cache: Any) -> mx.array:
    """Call a model and return its logits. Raises NotSupportedError if it returns none."""
    output = model(inputs, cache=cache)
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
    module, indices = type(model).__module__, count()
    layout = Layout(tuple(_read(own, str(i), indices, module) for i, own in enumerate(own_cache(model))))
    if not layout.leaves:
        raise NotSupportedError(f"{module} has no layers that use a cache")
    return layout


def own_cache(model: nn.Module) -> list[Any]:
    """Return mlx-lm's own cache list for a model, even while the model is attached."""
    with own_make_cache(model) as make_cache:
        return make_cache() if make_cache else [mlx_lm_cache.KVCache() for _ in model.layers]


def configuration_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's arguments by name; an empty dict if they are not a dataclass."""
    arguments = getattr(model, "args", None)
    return asdict(arguments) if is_dataclass(arguments) and not isinstance(arguments, type) else {}


def _leaves(entry: Entry) -> Iterator[Leaf]:
    if isinstance(entry, Leaf):
        yield entry
    else:
        for child in entry:
            yield from _leaves(child)


def _read(entry: Any, name: str, indices: Iterator[int], module: str) -> Entry:
    # Subclasses may behave differently, so only exact classes are accepted.
    kind = type(entry)
    if kind is mlx_lm_cache.KVCache:
        return Leaf(next(indices), name, Causal())
    if kind is mlx_lm_cache.RotatingKVCache and 0 <= entry.keep < entry.max_size:
        return Leaf(next(indices), name, Window(entry.max_size - entry.keep, entry.keep))
    if kind is mlx_lm_cache.ChunkedKVCache:
        return Leaf(next(indices), name, Chunk(entry.chunk_size))
    if kind is mlx_lm_cache.ArraysCache:
        return Leaf(next(indices), name, None, len(entry.cache))
    if kind is mlx_lm_cache.CacheList:
        return tuple(_read(own, f"{name}[{i}]", indices, module) for i, own in enumerate(entry.caches))
    raise NotSupportedError(
        f"layer {name} of {module} uses {class_of(entry)}, which is not supported; supported are KVCache, "
        f"RotatingKVCache, ChunkedKVCache, ArraysCache and CacheList of {mlx_lm_cache.__name__}"
    )
