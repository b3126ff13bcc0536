"""What a cache holds of a sequence, as JSON and named arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import mlx.core as mx

from ..caches.base import PlanningCache
from ..caches.encoder import EncoderCache
from ..caches.positional import PositionalCache
from ..caches.recurrent import RecurrentCache
from ..caches.wrapper import WrapperCache
from ..cells.rules import Causal, Chunk, Window
from ..errors import NotSupportedError
from . import positional, streams
from .checks import listing, mapping


def encode(
    cache: PlanningCache, sequence: int, arrays: dict[str, mx.array], prefix: str = ""
) -> dict[str, Any]:
    """Describe a sequence, and add its arrays to others under names that begin with `prefix`."""
    snapshot, kind = cache._snapshot(sequence), kind_of(cache)
    if isinstance(cache, WrapperCache):
        children = enumerate(cache._children)
        return kind | {"children": [encode(c, sequence, arrays, f"{prefix}{i}.") for i, c in children]}
    if isinstance(cache, PositionalCache):
        return kind | positional.encode(snapshot, arrays, prefix)
    if snapshot is None:
        return kind | {"end": 0}
    if isinstance(cache, EncoderCache):
        return kind | streams.encode_encoder(snapshot, arrays, prefix)
    return kind | streams.encode_recurrent(snapshot, arrays, prefix)


def decode(cache: PlanningCache, told: Any, arrays: Mapping[str, mx.array], prefix: str = "") -> Any:
    """The snapshot for `_plan_restore` of a cache of the same kind.

    Raises:
        ValueError: it is of another kind, or what is told would not be a sequence.
    """
    encoded, expected = mapping(told, "a cache"), kind_of(cache)
    if any(encoded.get(name) != value for name, value in expected.items()):
        found = {name: encoded[name] for name in ("kind", "size", "sinks") if name in encoded}
        raise ValueError(f"it holds {_text(found)}, this cache is {_text(expected)}")
    if isinstance(cache, WrapperCache):
        children = listing(encoded.get("children"), "the children", len(cache._children))
        pairs = enumerate(zip(cache._children, children, strict=True))
        return [decode(child, part, arrays, f"{prefix}{i}.") for i, (child, part) in pairs]
    if isinstance(cache, PositionalCache):
        snapshot = positional.decode(encoded, arrays, prefix)
        _check_layers(cache._store.layers.keys(), snapshot.forms.keys())
        return snapshot
    if isinstance(cache, EncoderCache):
        return streams.decode_encoder(encoded, arrays, prefix)
    stream = streams.decode_recurrent(encoded, arrays, prefix)
    if isinstance(cache, RecurrentCache) and stream:
        _check_layers(cache._forms.keys(), {layer for state in stream.states.values() for layer in state})
    return stream


def _check_layers(own: Set[int], found: Set[int]) -> None:
    """Raise ValueError where a file lacks layers that a cache has: they would be read as zeros."""
    if found and own - found:
        raise ValueError(f"it holds layers {sorted(found)}, this cache has {sorted(own)}")


def kind_of(cache: PlanningCache) -> dict[str, Any]:
    """What a cache must have in common with one whose sequences it takes."""
    if isinstance(cache, PositionalCache):
        rule = cache._rule
        if isinstance(rule, Causal):
            return {"kind": "causal"}
        if isinstance(rule, Window):
            return {"kind": "window", "size": rule.size, "sinks": rule.sinks}
        if isinstance(rule, Chunk):
            return {"kind": "chunk", "size": rule.size}
        # A rule of somebody's own is none of these, and would be read back as another.
        raise NotSupportedError(
            f"a cache of {type(rule).__name__} cannot be saved: files have no name for it"
        )
    for kind, name in ((WrapperCache, "wrapper"), (EncoderCache, "encoder"), (RecurrentCache, "recurrent")):
        if isinstance(cache, kind):
            return {"kind": name}
    raise NotSupportedError(f"a {type(cache).__name__} cannot be saved")


def _text(kind: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in kind.items())
