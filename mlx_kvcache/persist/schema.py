"""Reading what a file's header says, of which nothing is believed: every fault is a ValueError.

MLX arrays as bytes, and back.

A snapshot of keys and values by position, as JSON and named arrays, and back.

Sequences of the encoder and recurrent kinds, as JSON and named arrays, and back.

What a cache holds of a sequence, as JSON and named arrays, and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches import encoder, recurrent
from ..caches.base import PlanningCache
from ..caches.causal import PositionalCache
from ..caches.encoder import EncoderCache
from ..caches.recurrent import RecurrentCache
from ..caches.snapshot import Run, Snapshot
from ..caches.wrapper import WrapperCache
from ..cells.visibility import Causal, Chunk, Window
from ..errors import CacheFileError, NotSupportedError
from ..quantization import Codec, checked_codec
from ..storage.buffers import Form, Lanes
from ..storage.codec import Lane, Packed, Plain
from .container import Contents, Stored, read_arrays
from .header import short

LARGEST = 2**40
"""Of positions and counts."""


def integer(value: object, what: str, low: int = 0, high: int = LARGEST) -> int:
    """A whole number from `low` to `high`; a bool, which is an int to Python, is none."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {short(value)}, not a whole number from {low} to {high}")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """An object of JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, not an object")
    return value


def listing(value: object, what: str, length: int | None = None) -> list[Any]:
    """A list, of `length` items where that is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{what} is {short(value)}, not a list" + (f" of {length}" if length else ""))
    return value


def layer_index(name: object) -> int:
    """The key of an object by layers."""
    if not isinstance(name, str) or not name.isdecimal() or len(name) > 9:
        raise ValueError(f"{short(name)} is no layer")
    return int(name)


def array(arrays: Mapping[str, mx.array], name: object) -> mx.array:
    """An array of the file."""
    if not isinstance(name, str) or name not in arrays:
        raise ValueError(f"there is no array {short(name)}")
    return arrays[name]


def shaped(arrays: Mapping[str, mx.array], name: str, shape: tuple[int, ...], *dtypes: mx.Dtype) -> mx.array:
    """An array of the file that has a shape, and one of some dtypes."""
    found = array(arrays, name)
    if found.shape != shape or found.dtype not in dtypes:
        told = f"{shape} of {' or '.join(str(dtype) for dtype in dtypes)}"
        raise ValueError(f"array {short(name)} is {found.shape} of {found.dtype}, the header says {told}")
    return found


_DTYPES: dict[str, tuple[mx.Dtype, type[np.generic]]] = {
    "BOOL": (mx.bool_, np.uint8),
    "U8": (mx.uint8, np.uint8),
    "U16": (mx.uint16, np.uint16),
    "U32": (mx.uint32, np.uint32),
    "U64": (mx.uint64, np.uint64),
    "I8": (mx.int8, np.int8),
    "I16": (mx.int16, np.int16),
    "I32": (mx.int32, np.int32),
    "I64": (mx.int64, np.int64),
    "F16": (mx.float16, np.float16),
    "BF16": (mx.bfloat16, np.uint16),
    "F32": (mx.float32, np.float32),
    "C64": (mx.complex64, np.complex64),
}
"""By safetensors' names MLX's dtypes, and those of NumPy's that hold their bytes."""
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}


def name_of(dtype: mx.Dtype) -> str:
    """Safetensors' name of a dtype."""
    return _NAMES[dtype]


def dtype_of(name: str) -> mx.Dtype:
    """The other way round. Raises ValueError for a dtype that MLX does not have."""
    if name not in _DTYPES:
        raise ValueError(f"MLX has no dtype {name!r}")
    return _DTYPES[name][0]


def as_stored(arrays: Mapping[str, mx.array]) -> dict[str, Stored]:
    """Copies of arrays as bytes, which hold none of MLX's memory. Evaluates them."""
    mx.eval(list(arrays.values()))
    return {name: _as_stored(array) for name, array in arrays.items()}


def _as_stored(array: mx.array) -> Stored:
    # NumPy has no bfloat16; the bytes are the same.
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    data = np.array(plain, order="C", copy=True).reshape(-1).view(np.uint8)
    return Stored(name_of(array.dtype), tuple(array.shape), data)


def load_arrays(contents: Contents, verify: bool, lazy: bool = False) -> dict[str, mx.array]:
    """The arrays of a file, in memory: MLX can evaluate a lazy one only in the thread that made it.

    Args:
        verify: compare their checksums. Otherwise damage goes unseen.
        lazy: read nothing now. Each array is read when it is evaluated, in this thread.

    Raises:
        CacheFileError: the file cannot be read, or an array is damaged.
    """
    if not lazy:
        return dict(_read(contents, verify))
    try:
        loaded = mx.load(str(contents.path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CacheFileError(contents.path, str(error)) from error
    assert isinstance(loaded, dict)
    return {name: loaded[name] for name in contents.entries}


def _read(contents: Contents, verify: bool) -> Iterator[tuple[str, mx.array]]:
    for name, (dtype, shape, data) in read_arrays(contents, verify=verify):
        if dtype not in _DTYPES:
            raise CacheFileError(
                contents.path, f"array {name!r} is of dtype {dtype}, which MLX does not have"
            )
        ours, theirs = _DTYPES[dtype]
        array = mx.array(data.view(theirs)).view(ours).reshape(shape)
        mx.eval(array)
        yield name, array


_SLOTS = ("keys", "values")
_PARTS = ("words", "scales", "biases")
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def encode_positional(snapshot: Snapshot, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
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


def decode_positional(told: Mapping[str, Any], arrays: Mapping[str, mx.array], prefix: str) -> Snapshot:
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


def encode(
    cache: PlanningCache, sequence: int, arrays: dict[str, mx.array], prefix: str = ""
) -> dict[str, Any]:
    """Describe a sequence, and add its arrays to others under names that begin with `prefix`."""
    snapshot, kind = cache._snapshot(sequence), kind_of(cache)
    if isinstance(cache, WrapperCache):
        children = enumerate(cache._children)
        return kind | {"children": [encode(c, sequence, arrays, f"{prefix}{i}.") for i, c in children]}
    if isinstance(cache, PositionalCache):
        return kind | encode_positional(snapshot, arrays, prefix)
    if snapshot is None:
        return kind | {"end": 0}
    if isinstance(cache, EncoderCache):
        return kind | encode_encoder(snapshot, arrays, prefix)
    return kind | encode_recurrent(snapshot, arrays, prefix)


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
        snapshot = decode_positional(encoded, arrays, prefix)
        _check_layers(cache._store.layers.keys(), snapshot.forms.keys())
        return snapshot
    if isinstance(cache, EncoderCache):
        return decode_encoder(encoded, arrays, prefix)
    stream = decode_recurrent(encoded, arrays, prefix)
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
