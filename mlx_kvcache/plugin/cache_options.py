"""Checks the options of `make_prompt_cache` and makes an empty conversation from them.

Also works out how each layer of the model quantizes its keys and values (`quantization_of`), and writes the
options of a conversation in a form that a file can hold (`options_of`).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import mlx.nn as nn

from ..arguments import class_of, whole
from ..cells.visibility import Causal, Chunk, Rule
from ..errors import NotSupportedError
from ..quantization import RECENT, Bits, Quantization, Transform, unused
from .hosts.layout import Layout, Leaf, language_model_of, layout_of
from .pool.conversation import Conversation, Limits
from .pool.pool import Checkpoints, Pool, pool_for
from .pool.weights import identity
from .ranks import ALONE, Ranks
from .trial import try_out

KvBits = Bits | Callable[[int], Bits]
"""Bit widths for all layers, or a function from a layer's index in the model's cache list to its widths."""

KvFloat = Iterable[int] | Literal["last"]
"""Indices of layers that are not quantized, negative ones from the end; "last" is the last with keys."""


def reusable(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options that can make several caches: copies those that may be iterators."""
    once = ("kv_float", "kv_text")
    copies = {
        name: tuple(options[name])
        for name in once
        if isinstance(options.get(name), Iterable) and not isinstance(options[name], str)
    }
    return options | copies


@dataclass(frozen=True)
class _ByLeaf:
    """Bit widths of each leaf. Compares by value, so that caches with the same widths share a pool."""

    bits: tuple[Bits, ...]

    def __call__(self, leaf: int) -> Bits:
        return self.bits[leaf]


def quantization_of(pool: Pool, storage: Storage) -> Quantization | None:
    """Returns the quantization of a model's pool, or None if no layer is quantized.

    Raises:
        ValueError: as `Quantization`, `kv_float` names a layer that the model does not have, or `kv_text` is
            no list of the model's tokens.
    """
    group_size, (after,) = storage.kv_group_size, whole(quantize_after=storage.quantize_after)
    in_float = _float_layers(pool.layout, storage.kv_float)
    bits = tuple(
        None
        if leaf.rule is None or leaf.layer in in_float
        else _bits_of(leaf, storage.kv_bits, pool.mirrored)
        for leaf in pool.leaves
    )
    # Checks every width, including those of layers in float.
    (recent,) = whole(kv_recent=storage.kv_recent)
    by_leaf = Quantization(_ByLeaf(bits), group_size, after, storage.kv_transform, recent=recent)
    # So that it equals what stores the same.
    by_leaf = replace(by_leaf, **unused(codec for leaf in pool.leaves for codec in by_leaf.of(leaf.index)))
    if storage.kv_text and by_leaf.transform != "none":
        by_leaf = replace(by_leaf, centers=pool.ask(pool, "centers", tuple(storage.kv_text)))
    keyed = {own for own, leaf in zip(bits, pool.leaves, strict=True) if leaf.rule is not None}
    if keyed <= {None}:
        return None
    return replace(by_leaf, bits=keyed.pop()) if len(keyed) == 1 else by_leaf


def _tokens(text: Any) -> tuple[int, ...]:
    """Returns the tokens of a text as ints. Raises ValueError for anything else."""
    listed = text.tolist() if hasattr(text, "tolist") else text
    if not isinstance(listed, Iterable):
        raise ValueError(f"kv_text must be token ids, as tokenizer.encode returns them; got {text!r}")
    for token in (tokens := tuple(listed)):
        if not hasattr(token, "__index__") or token < 0:
            raise ValueError(
                f"kv_text contains {token!r}; it must be token ids, as tokenizer.encode returns them"
            )
    return tuple(map(index, tokens))


def _bits_of(leaf: Leaf, kv_bits: KvBits, mirrored: Container[int]) -> Bits:
    """Returns the bit widths of a leaf: one number if keys and values have the same, as in `mirrored`."""
    bits = kv_bits(leaf.layer) if callable(kv_bits) else kv_bits
    if not isinstance(bits, (tuple, list)):
        return bits
    if len(bits) != 2:
        raise ValueError(f"kv_bits must be one width, or a pair of widths for keys and values; got {bits}")
    keys, values = bits
    return keys if keys == values or leaf.index in mirrored else (keys, values)


def _float_layers(layout: Layout, kv_float: KvFloat) -> set[int]:
    """Returns the layers whose keys and values are not quantized."""
    keyed = [leaf.layer for leaf in layout.leaves if leaf.rule is not None]
    if kv_float == "last":
        return {keyed[-1]} if keyed else set()
    if isinstance(kv_float, str) or not isinstance(kv_float, Iterable):
        raise ValueError(f'kv_float must be layer indices or "last", got {kv_float!r}')
    count, layers = len(layout.entries), list(kv_float)
    for layer in layers:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"kv_float contains {layer!r}; layer indices are {-count} to {count - 1}")
    return {layer % count for layer in layers}


class Storage(NamedTuple):
    """The options of `make_prompt_cache` that set how keys and values are stored."""

    kv_bits: KvBits = None
    kv_group_size: int = 64
    kv_float: KvFloat = ()
    quantize_after: int = 0
    kv_transform: Transform = "hadamard"
    kv_text: Sequence[int] = ()
    kv_recent: int = RECENT


OPTIONS = (*Limits._fields, *Storage._fields, "group")
"""Names of the options of `make_prompt_cache`."""
_THEIRS = {"quantized_kv_start": "quantize_after"}
"""Options of mlx-lm, and their names here."""


def check_options(given: Mapping[str, Any], function: str, own: Iterable[str] = ()) -> None:
    """Checks the names of options that a function passes on; `own` are names of its other parameters.

    Raises:
        TypeError: an option does not exist; the message suggests the most similar one.
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
    """Makes a function check the names of its options with `check_options`."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_options(kwargs, function.__name__, ["model"])
        return function(*args, **kwargs)

    return checked


def new_conversation(
    model: nn.Module, limits: Limits, storage: Storage, ranks: Ranks = ALONE
) -> Conversation:
    """Makes an empty conversation of a model, on all ranks or on none. Raises as `make_prompt_cache`."""
    model = language_model_of(model)
    if not ranks.is_alone:
        # The options decide how the model is tried, so ranks compare them before they run it.
        ranks.agree(_described(model, limits, storage))
    with ranks.together("make a cache"):
        return _make(model, limits, storage, ranks)


def _described(model: nn.Module, limits: Limits, storage: Storage) -> str:
    """Describes the options and the model, which must be the same on all ranks."""
    options = limits._asdict() | storage._asdict()
    if callable(storage.kv_bits):
        # The text of a function has its address, which differs from rank to rank.
        options["kv_bits"] = "by layer"
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    identified = ", ".join(identity(model).values()) if isinstance(model, nn.Module) else type(model).__name__
    return f"make a cache with {listed} for {identified}"


def _make(model: nn.Module, limits: Limits, storage: Storage, ranks: Ranks) -> Conversation:
    if not isinstance(model, nn.Module) or not (hasattr(model, "layers") or hasattr(model, "make_cache")):
        inside = getattr(model, "language_model", None)
        hint = f"; pass its language_model, a {class_of(inside)}" if inside else ""
        raise TypeError(
            "model must be a model of mlx-lm or mlx-vlm, "
            f"got {class_of(model)} without layers or make_cache{hint}"
        )
    limits, storage = limits.checked(), storage._replace(kv_text=_tokens(storage.kv_text))
    layout = layout_of(model)
    shifts = limits.capacity if limits.overflow == "shift" else None
    rewinds = [_rewind(rule, limits.rewind, shifts) for rule in layout.rules]
    checkpoints = Checkpoints(limits.checkpoints, limits.checkpoint_bytes)
    pool = pool_for(model, layout, rewinds, None, ranks, checkpoints=checkpoints)
    try_out(pool)
    if not ranks.is_alone:
        # Ranks of a pipeline have different layers and would try this at different times, so all do it now.
        _ = pool.batching, pool.mixers
    quantization = quantization_of(pool, storage)
    if quantization:
        pool = pool.sibling(quantization)
        pool.text = tuple(storage.kv_text) if quantization.centers else ()
    if shifts and pool.scheme.refusal:
        raise NotSupportedError(f'overflow="shift": {pool.scheme.refusal}')
    return Conversation(pool, limits)


def options_of(conversation: Conversation) -> dict[str, Any]:
    """Returns options of `make_prompt_cache` that make a conversation like this one, as JSON values."""
    pool = conversation.pool
    options: dict[str, Any] = conversation.limits._asdict()
    if pool.quantization is None:
        return options
    bits: list[Any] = [None] * len(pool.layout.entries)
    for leaf in reversed(pool.leaves):
        if leaf.rule is not None:
            # An entry of several leaves is described by its first leaf, which the reversed loop reaches last.
            bits[leaf.layer] = [codec and codec.bits for codec in pool.codecs(leaf)]
    options |= {
        "kv_bits": bits,
        "kv_group_size": pool.quantization.group_size,
        "quantize_after": pool.quantization.after,
    }
    if pool.quantization.transform != "none":
        options["kv_transform"] = pool.quantization.transform
    if pool.quantization.recent:
        options["kv_recent"] = pool.quantization.recent
    if pool.quantization.centers:
        options["kv_text"] = list(pool.text)
    return options


def by_layer(bits: Sequence[Any]) -> KvBits:
    """Returns `kv_bits` as a function of the layer, from the list that `options_of` made."""

    def of(layer: int) -> Bits:
        own = bits[layer] if layer < len(bits) else None
        return tuple(own) if own else None

    return of


def _rewind(rule: Rule | None, rewind: int, capacity: int | None) -> int:
    """Returns how many newest tokens a kind of layer must be able to drop.

    Args:
        rewind: the option of `make_prompt_cache`.
        capacity: the capacity of a cache that shifts; None for any other.
    """
    if rule is None:
        return rewind
    if isinstance(rule, Causal):
        return 1
    if capacity is not None and capacity <= 4 * rule.size:
        # After a shift the window may reach past the gap, so all remaining tokens must be held.
        return capacity
    if capacity is not None and isinstance(rule, Chunk):
        # A shift moves the borders of chunks, so the next token may be the last of a full chunk.
        return max(rule.size, rewind)
    return max(1, rewind)
