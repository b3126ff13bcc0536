"""Sequences of the encoder and recurrent kinds, as JSON and named arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..caches import encoder, recurrent
from .checks import array, integer, layer_index, listing, mapping


def encode_encoder(stream: encoder.Stream, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe what a sequence looks at, and add its arrays to others."""
    layers = stream.entry.layers if stream.entry else {}
    for layer, (keys, values) in layers.items():
        arrays |= {f"{prefix}{layer}.keys": keys, f"{prefix}{layer}.values": values}
    position = stream.entry.position if stream.entry else None
    return {"end": stream.end, "position": position, "layers": [str(layer) for layer in layers]}


def decode_encoder(
    told: Mapping[str, Any], arrays: Mapping[str, mx.array], prefix: str
) -> encoder.Stream | None:
    """The sequence again. Raises ValueError where it would not be one."""
    end = integer(told.get("end"), "the end")
    if not end or told.get("position") is None:
        return encoder.Stream(end, None) if end else None
    names = listing(told.get("layers"), "the layers")
    layers = {
        layer_index(name): (array(arrays, f"{prefix}{name}.keys"), array(arrays, f"{prefix}{name}.values"))
        for name in names
    }
    position = integer(told["position"], "the position of the input", 0, end - 1)
    return encoder.Stream(end, encoder.Entry(position, layers))


def encode_recurrent(stream: recurrent.Stream, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe states, and add their arrays to others. One that several states share is there once."""
    names: dict[int, str] = {}

    def name_of(state: mx.array | None) -> str | None:
        if state is None:
            return None
        name = names.setdefault(id(state), f"{prefix}{len(names)}")
        arrays[name] = state
        return name

    states = [
        {
            "position": position,
            "layers": {str(layer): [name_of(part) for part in own] for layer, own in state.items()},
        }
        for position, state in stream.states.items()
    ]
    return {"end": stream.end, "keeps_newest": stream.keeps_newest, "states": states}


def decode_recurrent(
    told: Mapping[str, Any], arrays: Mapping[str, mx.array], prefix: str
) -> recurrent.Stream | None:
    """The states again. Raises ValueError where they would not be some."""
    end = integer(told.get("end"), "the end")
    if not end:
        return None
    states = {}
    for told_state in listing(told.get("states"), "the states"):
        state = mapping(told_state, "a state")
        position = integer(state.get("position"), "the position of a state", 1, end)
        layers = mapping(state.get("layers"), "the layers of a state")
        states[position] = {
            layer_index(name): tuple(
                None if part is None else array(arrays, part) for part in listing(parts, "a layer's state")
            )
            for name, parts in layers.items()
        }
    return recurrent.Stream(end, states, told.get("keeps_newest") is True)
