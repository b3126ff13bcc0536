"""The logits in what a model's call returns: an array, or an object that has them as `.logits`.

What a model's own cache is made of, entry by entry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ...arguments import class_of
from ...cells.visibility import Causal, Chunk, Rule, Window
from ...errors import NotSupportedError
from .observe import own_make_cache


def found_logits(output: Any) -> mx.array | None:
    """The logits in a model's output, None where there are none."""
    logits = output if isinstance(output, mx.array) else getattr(output, "logits", None)
    return logits if isinstance(logits, mx.array) else None


def logits_of(model: Any, inputs: mx.array, cache: Any) -> mx.array:
    """Call a model and return its logits.

    Raises:
        NotSupportedError: the model returned neither an array nor an object with `.logits`.
    """
    output = model(inputs, cache=cache)
    logits = found_logits(output)
    if logits is None:
        raise NotSupportedError(
            f"{type(model).__module__} returned a {type(output).__name__}; its logits must be an array, or "
            "the attribute .logits of an object"
        )
    return logits


def joined(outputs: Sequence[Any], join: Callable[[list[mx.array]], mx.array]) -> Any:
    """The output of one call for the rows of several: each array in it is made of theirs.

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
            f"the outputs of calls for several rows cannot be joined: a {type(first).__name__} is in them"
        )
    whole = copy.copy(first)
    for name in vars(first):
        # The class may be frozen.
        object.__setattr__(whole, name, joined([getattr(output, name) for output in outputs], join))
    return whole


@dataclass(frozen=True)
class Leaf:
    """One cache of a model: keys and values that a rule makes visible, or a recurrence's arrays.

    Attributes:
        index: its place among all leaves of the model.
        name: its place in the model's cache list, such as "3", or "3[1]" inside a `CacheList`.
        rule: who sees whom; None for arrays.
        slots: how many arrays; 0 for keys and values.
    """

    index: int
    name: str
    rule: Rule | None
    slots: int = 0

    @property
    def layer(self) -> int:
        """The index of its entry in the model's cache list."""
        return int(self.name.partition("[")[0])


Entry = Leaf | tuple["Entry", ...]


@dataclass(frozen=True)
class Layout:
    """The entries of a model's cache list, a `CacheList` as a tuple, and all leaves in order."""

    entries: tuple[Entry, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for entry in self.entries for leaf in _leaves(entry))

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        """The different rules, in order of appearance; None stands for recurrent arrays."""
        return tuple(dict.fromkeys(leaf.rule for leaf in self.leaves))

    @property
    def is_recurrent(self) -> bool:
        return None in self.rules


def layout_of(model: nn.Module) -> Layout:
    """Read what the model asks for: its `make_cache`, or a cache of full attention for each layer.

    Raises:
        NotSupportedError: an entry of an unknown class, or a model that caches nothing.
    """
    entries = own_cache(model)
    found: list[Entry] = []
    count = 0
    for index, entry in enumerate(entries):
        found.append(_read(entry, str(index), count, type(model).__module__))
        count += sum(1 for _ in _leaves(found[-1]))
    if not count:
        raise NotSupportedError(f"{type(model).__module__} caches nothing")
    return Layout(tuple(found))


def own_cache(model: nn.Module) -> list[Any]:
    """A cache list of mlx-lm's own for a model, also while the model is attached."""
    with own_make_cache(model) as make_cache:
        return make_cache() if make_cache else [mlx_lm_cache.KVCache() for _ in model.layers]


def _leaves(entry: Entry) -> Iterator[Leaf]:
    if isinstance(entry, Leaf):
        yield entry
    else:
        for child in entry:
            yield from _leaves(child)


def _read(entry: Any, name: str, first: int, module: str) -> Entry:
    # Subclasses may behave in any way, so the class must be just the one that is known.
    kind = type(entry)
    if kind is mlx_lm_cache.KVCache:
        return Leaf(first, name, Causal())
    if kind is mlx_lm_cache.RotatingKVCache and 0 <= entry.keep < entry.max_size:
        return Leaf(first, name, Window(entry.max_size - entry.keep, entry.keep))
    if kind is mlx_lm_cache.ChunkedKVCache:
        return Leaf(first, name, Chunk(entry.chunk_size))
    if kind is mlx_lm_cache.ArraysCache:
        return Leaf(first, name, None, len(entry.cache))
    if kind is mlx_lm_cache.CacheList:
        children: list[Entry] = []
        for index, child in enumerate(entry.caches):
            children.append(_read(child, f"{name}[{index}]", first, module))
            first += sum(1 for _ in _leaves(children[-1]))
        return tuple(children)
    raise NotSupportedError(
        f"layer {name} of {module} uses {class_of(entry)}, which is not supported; supported are KVCache, "
        f"RotatingKVCache, ChunkedKVCache, ArraysCache and CacheList of {mlx_lm_cache.__name__}"
    )
