"""From the options of `make_prompt_cache` to an empty conversation."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import mlx.nn as nn

from ..arguments import class_of
from ..cells.rules import Causal, Chunk, Rule
from ..errors import NotSupportedError
from ..quantisation import Bits
from .bits import KvBits, KvFloat, quantisation_of
from .conversation import Conversation, Limits
from .fingerprint import identity
from .layout import layout_of
from .pool import pool_for
from .ranks import ALONE, Ranks
from .trial import try_out


class Storage(NamedTuple):
    """How keys and values are stored; see `make_prompt_cache`."""

    kv_bits: KvBits = None
    kv_group_size: int = 64
    kv_float: KvFloat = ()
    quantise_after: int = 0


OPTIONS = (*Limits._fields, *Storage._fields, "group")
"""Of `make_prompt_cache`."""
_THEIRS = {"quantized_kv_start": "quantise_after"}
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
    quantisation = quantisation_of(layout, pool.mirrored, *storage)
    if quantisation:
        pool = pool.sibling(quantisation)
    if shifts and pool.scheme.refusal:
        raise NotSupportedError(f'overflow="shift": {pool.scheme.refusal}')
    return Conversation(pool, limits)


def options_of(conversation: Conversation) -> dict[str, Any]:
    """Options of `make_prompt_cache` that make one like this, as JSON can hold them."""
    pool = conversation.pool
    options: dict[str, Any] = conversation.limits._asdict()
    if pool.quantisation is None:
        return options
    bits: list[Any] = [None] * len(pool.layout.entries)
    for leaf in reversed(pool.leaves):
        if leaf.rule is not None:
            # The first of an entry comes last: an index behind it follows it.
            bits[leaf.layer] = [codec and codec.bits for codec in pool.codecs(leaf)]
    return options | {
        "kv_bits": bits,
        "kv_group_size": pool.quantisation.group_size,
        "quantise_after": pool.quantisation.after,
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
