"""A snapshot of keys and values by position, as JSON and named arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..arrays.lanes import Lane, Packed, Plain
from ..arrays.pairs import Form, Lanes
from ..caches.snapshot import Run, Snapshot
from ..quantisation import Codec, checked_codec
from .checks import integer, layer_index, listing, mapping, shaped
from .tensors import dtype_of, name_of

_SLOTS = ("keys", "values")
_PARTS = ("words", "scales", "biases")
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def encode(snapshot: Snapshot, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe a snapshot, and add its arrays to others under names that begin with `prefix`."""
    runs = []
    for index, run in enumerate(snapshot.runs):
        for layer, lanes in run.layers.items():
            for slot, lane in zip(_SLOTS, lanes, strict=True):
                encode_lane(lane, arrays, f"{prefix}{index}.{layer}.{slot}")
        is_packed = any(isinstance(lane, Packed) for lanes in run.layers.values() for lane in lanes)
        runs.append({"begin": run.begin, "length": run.length, "packed": is_packed})
    layers = {str(layer): _encode_form(form) for layer, form in snapshot.forms.items()}
    return {"end": snapshot.end, "runs": runs, "layers": layers}


def decode(told: Mapping[str, Any], arrays: Mapping[str, mx.array], prefix: str) -> Snapshot:
    """The snapshot again. Raises ValueError where it would not be one."""
    end = integer(told.get("end"), "the end")
    layers = mapping(told.get("layers"), "the layers")
    forms = {layer_index(name): _decode_form(layer) for name, layer in layers.items()}
    runs, at = [], 0
    for index, run in enumerate(listing(told.get("runs"), "the runs")):
        own = mapping(run, "a run")
        begin = integer(own.get("begin"), "the beginning of a run", at, end)
        length = integer(own.get("length"), "the length of a run", 1, end - begin)
        is_packed = own.get("packed") is True
        lanes = {
            layer: _decode_lanes(arrays, f"{prefix}{index}.{layer}", form, length, is_packed)
            for layer, form in forms.items()
        }
        runs.append(Run(begin, length, lanes))
        at = begin + length
    if runs and not forms:
        raise ValueError(f"{len(runs)} runs of tokens, and no layer that has stored them")
    return Snapshot(end, tuple(runs), forms if runs else {})


def _encode_form(form: Form) -> dict[str, Any]:
    return {
        "heads": form.heads,
        "dims": [form.key_dim, form.value_dim],
        "dtypes": [name_of(form.key_dtype), name_of(form.value_dtype)],
        "codecs": [form.key_codec, form.value_codec],
    }


def _decode_form(told: Any) -> Form:
    layer = mapping(told, "a layer")
    key_dim, value_dim = listing(layer.get("dims"), "the sizes of heads", 2)
    dtypes = [dtype_of(str(name)) for name in listing(layer.get("dtypes"), "the dtypes", 2)]
    if any(dtype not in _FLOATS for dtype in dtypes):
        raise ValueError(f"keys and values of {dtypes[0]} and {dtypes[1]}, expected floats")
    codecs = [decode_codec(codec) for codec in listing(layer.get("codecs"), "the codecs", 2)]
    return Form(
        integer(layer.get("heads"), "the number of heads", 1),
        # A layer has keys; for want of both nothing would bound the number of its cells.
        integer(key_dim, "the size of keys", 1),
        integer(value_dim, "the size of values"),
        dtypes[0],
        dtypes[1],
        codecs[0],
        codecs[1],
    )


def decode_codec(told: Any) -> Codec | None:
    """A codec, or None for float. Raises ValueError for one that there is not."""
    if told is None:
        return None
    return checked_codec(*listing(told, "a codec", 2))


def _decode_lanes(
    arrays: Mapping[str, mx.array], name: str, form: Form, length: int, is_packed: bool
) -> Lanes:
    heads, key_dim, value_dim, key_dtype, value_dtype, keys, values = form if is_packed else form.plain()
    return (
        decode_lane(arrays, f"{name}.keys", (heads, length, key_dim), key_dtype, keys),
        decode_lane(arrays, f"{name}.values", (heads, length, value_dim), value_dtype, values),
    )


def encode_lane(lane: Lane, arrays: dict[str, mx.array], name: str) -> None:
    """Add a lane to others under a name, or names that begin with it."""
    if isinstance(lane, Packed):
        arrays |= {f"{name}.{part}": stored for part, stored in zip(_PARTS, lane.arrays, strict=True)}
    else:
        arrays[name] = lane.array


def decode_lane(
    arrays: Mapping[str, mx.array],
    name: str,
    size: tuple[int, int, int],
    dtype: mx.Dtype,
    codec: Codec | None,
) -> Lane:
    """A lane of (heads, cells, dim). Raises ValueError where its arrays are not of that size."""
    heads, length, dim = size
    if codec is None:
        return Plain(shaped(arrays, name, (1, heads, length, dim), dtype))
    if dim % codec.group_size:
        raise ValueError(f"heads of {dim} features in groups of {codec.group_size}")
    words = shaped(arrays, f"{name}.words", (1, heads, length, dim * codec.bits // 32), mx.uint32)
    groups = (1, heads, length, dim // codec.group_size)
    scales, biases = (
        shaped(arrays, f"{name}.{part}", groups, mx.float16, mx.bfloat16, mx.float32) for part in _PARTS[1:]
    )
    return Packed(words, scales, biases, codec)
