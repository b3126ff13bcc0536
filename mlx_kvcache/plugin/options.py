"""In how many bits the layers of a model store keys and values, as `make_prompt_cache` is told.

From the options of `make_prompt_cache` to an empty conversation.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import mlx.nn as nn

from ..arguments import class_of, whole
from ..cells.visibility import Causal, Chunk, Rule
from ..errors import NotSupportedError
from ..quantization import Bits, Quantization
from .hosts.layout import Layout, Leaf, layout_of
from .pool.conversation import Conversation, Limits
from .pool.pool import pool_for
from .pool.weights import identity
from .ranks import ALONE, Ranks
from .trial import try_out

KvBits = Bits | Callable[[int], Bits]
"""Of all layers, or a function of the layer: its index in the model's cache list."""

KvFloat = Iterable[int] | Literal["last"]
"""Indices of layers that stay in float, negative ones from the end; "last" is the last with keys."""


def reusable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `make_prompt_cache` for several caches: the first would use an iterator of layers up."""
    layers = options.get("kv_float", ())
    is_listed = isinstance(layers, str) or not isinstance(layers, Iterable)
    return options if is_listed else options | {"kv_float": tuple(layers)}


@dataclass(frozen=True)
class _ByLeaf:
    """Bits of each leaf. A value and not a function, so that pools of the same can be told."""

    bits: tuple[Bits, ...]

    def __call__(self, leaf: int) -> Bits:
        return self.bits[leaf]


def quantization_of(
    layout: Layout,
    mirrored: Container[int],
    kv_bits: KvBits,
    group_size: int,
    kv_float: KvFloat,
    after: int,
) -> Quantization | None:
    """What a model's pool is to be made with; None where all stays in float.

    Args:
        mirrored: leaves whose values must be stored as their keys are.

    Raises:
        ValueError: as `Quantization`, or a layer that the model does not have.
    """
    (after,) = whole(quantize_after=after)
    in_float = _float_layers(layout, kv_float)
    bits = tuple(
        None if leaf.rule is None or leaf.layer in in_float else _bits_of(leaf, kv_bits, mirrored)
        for leaf in layout.leaves
    )
    # Checks all of them, also those that are to be float.
    by_leaf = Quantization(_ByLeaf(bits), group_size, after)
    for leaf in layout.leaves:
        by_leaf.of(leaf.index)
    keyed = {own for own, leaf in zip(bits, layout.leaves, strict=True) if leaf.rule is not None}
    if keyed <= {None}:
        return None
    return Quantization(keyed.pop(), group_size, after) if len(keyed) == 1 else by_leaf


def _bits_of(leaf: Leaf, kv_bits: KvBits, mirrored: Container[int]) -> Bits:
    """Bits of a leaf's keys and values; one number where they are the same."""
    bits = kv_bits(leaf.layer) if callable(kv_bits) else kv_bits
    if not isinstance(bits, (tuple, list)):
        return bits
    if len(bits) != 2:
        raise ValueError(f"kv_bits of keys and of values are two numbers, got {bits}")
    keys, values = bits
    if leaf.index in mirrored:
        values = keys
    return keys if keys == values else (keys, values)


def _float_layers(layout: Layout, kv_float: KvFloat) -> set[int]:
    """Layers whose keys and values stay in float."""
    keyed = [leaf.layer for leaf in layout.leaves if leaf.rule is not None]
    if kv_float == "last":
        return {keyed[-1]} if keyed else set()
    if isinstance(kv_float, str) or not isinstance(kv_float, Iterable):
        raise ValueError(f'kv_float must be indices of layers, or "last", got {kv_float!r}')
    count = len(layout.entries)
    chosen = set()
    for layer in kv_float:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"kv_float names layer {layer!r}; there are {count}")
        chosen.add(layer % count)
    return chosen


class Storage(NamedTuple):
    """How keys and values are stored; see `make_prompt_cache`."""

    kv_bits: KvBits = None
    kv_group_size: int = 64
    kv_float: KvFloat = ()
    quantize_after: int = 0


OPTIONS = (*Limits._fields, *Storage._fields, "group")
"""Of `make_prompt_cache`."""
_THEIRS = {"quantized_kv_start": "quantize_after"}
"""mlx-lm's names of options."""


def check_options(given: Mapping[str, Any], function: str, own: Iterable[str] = ()) -> None:
    """Check the names of options that a function passes on to `make_prompt_cache`.

    Args:
        own: the function's own parameters.

    Raises:
        TypeError: there is no such option; the nearest one is told first.
    """
    known = [*own, *OPTIONS]
    for name in given:
        if name in known:
            continue
        if name == "max_kv_size":
            n = given[name]
            raise TypeError(
                f'{function} has no option max_kv_size; use capacity={n}, overflow="shift", sinks=4'
            )
        near = difflib.get_close_matches(_THEIRS.get(name, name), known, n=1)
        guess = f"; did you mean {near[0]}?" if near else "."
        raise TypeError(f"{function} has no option {name}{guess} Its options are {', '.join(known)}")


P = ParamSpec("P")
T = TypeVar("T")


def with_checked_options(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which takes the options of `make_prompt_cache`; others are refused by `check_options`."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_options(kwargs, function.__name__, ["model"])
        return function(*args, **kwargs)

    return checked


def new_conversation(
    model: nn.Module, limits: Limits, storage: Storage, ranks: Ranks = ALONE
) -> Conversation:
    """An empty conversation of a model, on all ranks or none. Raises as `make_prompt_cache`."""
    if ranks.is_alone:
        return _made(model, limits, storage, ranks)
    # Before anything runs the model: what it tries depends on the options.
    ranks.agree(_told(model, limits, storage))
    with ranks.together("make a cache"):
        return _made(model, limits, storage, ranks)


def _told(model: nn.Module, limits: Limits, storage: Storage) -> str:
    """What ranks must have in common, in words. Functions differ from rank to rank in their addresses."""
    options = limits._asdict() | storage._asdict()
    if callable(storage.kv_bits):
        options["kv_bits"] = "by layer"
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    model_is = ", ".join(identity(model).values()) if isinstance(model, nn.Module) else type(model).__name__
    return f"make a cache with {listed} of {model_is}"


def _made(model: nn.Module, limits: Limits, storage: Storage, ranks: Ranks) -> Conversation:
    if not isinstance(model, nn.Module) or not (hasattr(model, "layers") or hasattr(model, "make_cache")):
        inside = getattr(model, "language_model", None)
        hint = f"; give it the model inside, its language_model (a {class_of(inside)})" if inside else ""
        raise TypeError(
            f"an mlx-lm model is needed, got {class_of(model)} without layers or make_cache{hint}"
        )
    limits = limits.checked()
    layout = layout_of(model)
    shifts = limits.capacity if limits.overflow == "shift" else None
    if (shifts or limits.sinks) and layout.is_recurrent:
        raise NotSupportedError(
            f'overflow="{limits.overflow}" with sinks={limits.sinks} on {type(model).__module__}: '
            "a recurrent state cannot forget tokens that later ones were added to, nor keep some of them"
        )
    rewinds = [_rewind(rule, limits.rewind, shifts) for rule in layout.rules]
    pool = pool_for(model, layout, rewinds, None, ranks)
    try_out(pool)
    if not ranks.is_alone:
        # Tried by all now, as ranks of a pipeline with other layers would need it at other times.
        _ = pool.batching
    quantization = quantization_of(layout, pool.mirrored, *storage)
    if quantization:
        pool = pool.sibling(quantization)
    if shifts and pool.scheme.refusal:
        raise NotSupportedError(f'overflow="shift": {pool.scheme.refusal}')
    return Conversation(pool, limits)


def options_of(conversation: Conversation) -> dict[str, Any]:
    """Options of `make_prompt_cache` that make one like this, as JSON can hold them."""
    pool = conversation.pool
    options: dict[str, Any] = conversation.limits._asdict()
    if pool.quantization is None:
        return options
    bits: list[Any] = [None] * len(pool.layout.entries)
    for leaf in reversed(pool.leaves):
        if leaf.rule is not None:
            # The first of an entry comes last: an index behind it follows it.
            bits[leaf.layer] = [codec and codec.bits for codec in pool.codecs(leaf)]
    return options | {
        "kv_bits": bits,
        "kv_group_size": pool.quantization.group_size,
        "quantize_after": pool.quantization.after,
    }


def by_layer(bits: Sequence[Any]) -> KvBits:
    """The function of the layer that `options_of` has written down."""

    def of(layer: int) -> Bits:
        own = bits[layer] if layer < len(bits) else None
        return tuple(own) if own else None

    return of


def _rewind(rule: Rule | None, rewind: int, capacity: int | None) -> int:
    """How many newest tokens a kind of layer can drop, in a cache that shifts within `capacity`, or not."""
    if rule is None or isinstance(rule, Causal):
        return 1
    if capacity is not None and capacity <= 4 * rule.size:
        # After a shift the window may reach over the gap, so nothing that stays may be forgotten.
        return capacity
    if capacity is not None and isinstance(rule, Chunk):
        # After a shift a chunk begins elsewhere, and the next token may be its last.
        return max(rule.size, rewind)
    return max(1, rewind)
