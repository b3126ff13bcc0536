"""Converts sequences of every kind of cache to JSON and named arrays, and back.

`encode` describes a sequence as a JSON object and collects its arrays; `decode` returns the snapshot that a
cache of the same kind restores. Each uses one function for each kind of cache.

A file may be corrupt or malicious, so decoding validates every field. Faults raise ValueError.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Set
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..caches import encoder, recurrent
from ..caches.base import PlanningCache
from ..caches.causal import PositionalCache
from ..caches.encoder import EncoderCache
from ..caches.recurrent import RecurrentCache
from ..caches.snapshot import Run, Snapshot, part_of
from ..caches.wrapper import WrapperCache
from ..cells.visibility import Causal, Chunk, Window
from ..errors import CacheFileError, NotSupportedError
from ..quantization import Codec, checked_codec
from ..storage.buffers import Form, Lanes
from ..storage.codec import Lane, Packed, Plain
from .container import Contents, Stored, faults_of, read_arrays
from .header import SIZES, short

LARGEST = 2**40
"""The largest position or count that is accepted."""


def integer(value: object, what: str, low: int = 0, high: int = LARGEST) -> int:
    """Return a whole number, which a bool is not."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {short(value)}, expected a whole number from {low} to {high}")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, expected an object")
    return value


def listing(value: object, what: str, length: int | None = None) -> list[Any]:
    """Return a list, of `length` items unless that is None."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{what} is {short(value)}, expected a list" + (f" of {length}" if length else ""))
    return value


def layer_index(name: object) -> int:
    """Return the layer index that a JSON object has as a key."""
    if not isinstance(name, str) or not name.isdecimal() or len(name) > 9:
        raise ValueError(f"{short(name)} is not a layer index")
    return int(name)


def array(arrays: Mapping[str, mx.array], name: object) -> mx.array:
    """Return an array of the file."""
    if not isinstance(name, str) or name not in arrays:
        raise ValueError(f"array {short(name)} is missing")
    return arrays[name]


def shaped(arrays: Mapping[str, mx.array], name: str, shape: tuple[int, ...], *dtypes: mx.Dtype) -> mx.array:
    """Return an array of the file that has the given shape and one of the given dtypes."""
    found = array(arrays, name)
    if found.shape != shape or found.dtype not in dtypes:
        expected = f"{shape} of {' or '.join(str(dtype) for dtype in dtypes)}"
        raise ValueError(f"array {short(name)} is {found.shape} of {found.dtype}, expected {expected}")
    return found


_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def as_stored(arrays: Mapping[str, mx.array]) -> dict[str, Stored]:
    """Evaluate arrays, and copy them to bytes outside MLX's memory."""
    mx.eval(list(arrays.values()))
    stored = {}
    for name, array in arrays.items():
        # NumPy has no bfloat16, so its bytes are copied as uint16.
        plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        data = np.array(plain, order="C", copy=True).reshape(-1).view(np.uint8)
        stored[name] = Stored(_NAMES[array.dtype], tuple(array.shape), data)
    return stored


def load_arrays(
    contents: Contents, verify: bool, lazy: bool = False, names: Iterable[str] | None = None
) -> dict[str, mx.array]:
    """Load the arrays of a file, or some of them. Options and errors are those of `open_file`."""
    if lazy:
        with faults_of(contents.path, RuntimeError):
            loaded = mx.load(str(contents.path), format="safetensors")
        assert isinstance(loaded, dict)
        return {name: loaded[name] for name in (contents.entries if names is None else names)}
    arrays = {}
    for name, (dtype, shape, data) in read_arrays(contents, names, verify):
        if dtype not in _DTYPES:
            raise CacheFileError(contents.path, f"array {name!r} has dtype {dtype}, which MLX does not have")
        arrays[name] = _array(dtype, shape, data)
    mx.eval(list(arrays.values()))
    return arrays


def _array(dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> mx.array:
    """Return the array of a `Stored`. MLX copies numbers faster than as many bytes."""
    if dtype == "BF16":
        return mx.array(data.view(np.uint16).reshape(shape)).view(mx.bfloat16)
    return mx.array(data.view(f"{dtype[0].lower()}{SIZES[dtype]}").reshape(shape))


_SLOTS = ("keys", "values")
_PARTS = ("words", "scales", "biases")
_FLOATS = ("F16", "BF16", "F32")


def encode_positional(snapshot: Snapshot, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe a snapshot, and add its arrays to `arrays` under names that begin with `prefix`."""
    runs = []
    for index, run in enumerate(snapshot.runs):
        for layer, lanes in run.layers.items():
            for slot, lane in zip(_SLOTS, lanes, strict=True):
                encode_lane(lane, arrays, f"{prefix}{index}.{layer}.{slot}")
        is_packed = any(isinstance(lane, Packed) for lanes in run.layers.values() for lane in lanes)
        runs.append({"begin": run.begin, "length": run.length, "packed": is_packed})
    layers = {
        str(layer): {
            "heads": form.heads,
            "dims": [form.key_dim, form.value_dim],
            "dtypes": [_NAMES[form.key_dtype], _NAMES[form.value_dtype]],
            "codecs": [encode_codec(form.key_codec), encode_codec(form.value_codec)],
        }
        for layer, form in snapshot.forms.items()
    }
    return {"end": snapshot.end, "runs": runs, "layers": layers}


def decode_positional(
    told: Mapping[str, Any],
    end: int,
    arrays: Mapping[str, mx.array],
    prefix: str,
    until: int | None = None,
) -> Snapshot:
    """Return the snapshot that `encode_positional` described, or only its runs that begin before `until`."""
    layers = mapping(told.get("layers"), "layers")
    forms = {layer_index(name): _decode_form(layer) for name, layer in layers.items()}
    runs, at = [], 0
    for index, run in enumerate(listing(told.get("runs"), "runs")):
        own = mapping(run, "a run")
        begin = integer(own.get("begin"), "begin of a run", at, end)
        if until is not None and begin >= until:
            break
        length = integer(own.get("length"), "length of a run", 1, end - begin)
        is_packed = own.get("packed") is True
        lanes = {
            layer: _decode_lanes(arrays, f"{prefix}{index}.{layer}", form, length, is_packed)
            for layer, form in forms.items()
        }
        runs.append(Run(begin, length, lanes))
        at = begin + length
    if runs and not forms:
        raise ValueError(f"layers is empty, but the file has {len(runs)} runs of tokens")
    return Snapshot(end, tuple(runs), forms if runs else {})


def _decode_form(told: Any) -> Form:
    layer = mapping(told, "a layer")
    key_dim, value_dim = listing(layer.get("dims"), "dims", 2)
    names = listing(layer.get("dtypes"), "dtypes", 2)
    if any(name not in _FLOATS for name in names):
        raise ValueError(f"keys and values have dtypes {short(names)}, expected floats: {', '.join(_FLOATS)}")
    key_dtype, value_dtype = (_DTYPES[name] for name in names)
    keys, values = (decode_codec(codec) for codec in listing(layer.get("codecs"), "codecs", 2))
    return Form(
        integer(layer.get("heads"), "the number of heads", 1),
        # With empty keys and values, the size of the file would not bound the number of cells.
        integer(key_dim, "head_dim of keys", 1),
        integer(value_dim, "head_dim of values"),
        key_dtype,
        value_dtype,
        keys,
        values,
    )


def encode_codec(codec: Codec | None) -> list[Any] | None:
    """Return a codec as JSON. Its transform and center are added only if there are some, as of version 2."""
    if codec is None:
        return None
    bits, group_size, transform, center = codec
    told = [bits, group_size] if transform == "none" else [bits, group_size, transform]
    return [*told, b64encode(center).decode()] if center else told


def decode_codec(told: Any) -> Codec | None:
    """Return a codec, or None for float."""
    if told is None:
        return None
    fields = codec_fields(told)
    return checked_codec(*fields[:3], *map(_center, fields[3:]))


def _center(told: Any) -> bytes:
    if not isinstance(told, str):
        raise ValueError(f"the center of a codec is {short(told)}, expected a text")
    return b64decode(told, validate=True)


def codec_fields(told: Any) -> list[Any]:
    """Return what `encode_codec` wrote: bits, group size and, if there are some, a transform and a center."""
    fields = listing(told, "a codec")
    if len(fields) not in (2, 3, 4):
        raise ValueError(f"a codec is {short(told)}, expected a list of 2 to 4")
    return fields


def _decode_lanes(
    arrays: Mapping[str, mx.array], name: str, form: Form, length: int, is_packed: bool
) -> Lanes:
    heads, key_dim, value_dim, key_dtype, value_dtype, keys, values, _ = form if is_packed else form.plain()
    return (
        decode_lane(arrays, f"{name}.keys", (heads, length, key_dim), key_dtype, keys),
        decode_lane(arrays, f"{name}.values", (heads, length, value_dim), value_dtype, values),
    )


def encode_lane(lane: Lane, arrays: dict[str, mx.array], name: str) -> None:
    """Add a lane to `arrays`: one array under `name`, or several whose names begin with it."""
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
    """Return a lane that `encode_lane` added, of size (heads, cells, head_dim).

    It is quantized if there is a codec, and otherwise has the dtype.
    """
    heads, length, dim = size
    if codec is None:
        return Plain(shaped(arrays, name, (1, heads, length, dim), dtype))
    codec.check(heads, dim)
    words = shaped(arrays, f"{name}.words", (1, heads, length, dim * codec.bits // 32), mx.uint32)
    groups = (1, heads, length, dim // codec.group_size)
    scales, biases = (
        shaped(arrays, f"{name}.{part}", groups, mx.float16, mx.bfloat16, mx.float32) for part in _PARTS[1:]
    )
    return Packed(words, scales, biases, codec)


def encode_encoder(stream: encoder.Stream, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe the encoder input of a sequence, and add its arrays to `arrays`."""
    layers = stream.entry.layers if stream.entry else {}
    for layer, (keys, values) in layers.items():
        arrays |= {f"{prefix}{layer}.keys": keys, f"{prefix}{layer}.values": values}
    position = stream.entry.position if stream.entry else None
    return {"end": stream.end, "position": position, "layers": [str(layer) for layer in layers]}


def decode_encoder(
    told: Mapping[str, Any], end: int, arrays: Mapping[str, mx.array], prefix: str
) -> encoder.Stream | None:
    """Return the stream that `encode_encoder` described."""
    if not end or told.get("position") is None:
        return encoder.Stream(end, None) if end else None
    layers = {
        layer_index(name): (array(arrays, f"{prefix}{name}.keys"), array(arrays, f"{prefix}{name}.values"))
        for name in listing(told.get("layers"), "layers")
    }
    position = integer(told["position"], "position of the encoder input", 0, end - 1)
    return encoder.Stream(end, encoder.Entry(position, layers))


def encode_recurrent(stream: recurrent.Stream, arrays: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    """Describe the states of a sequence, and add their arrays to `arrays`. Shared arrays are added once."""
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
    """Return the stream that `encode_recurrent` described. Raises ValueError if it is invalid."""
    end = integer(told.get("end"), "end")
    if not end:
        return None
    states = {}
    for told_state in listing(told.get("states"), "states"):
        state = mapping(told_state, "a state")
        position = integer(state.get("position"), "position of a state", 1, end)
        layers = mapping(state.get("layers"), "layers of a state")
        states[position] = {
            layer_index(name): tuple(
                None if part is None else array(arrays, part)
                for part in listing(parts, "the state of a layer")
            )
            for name, parts in layers.items()
        }
    return recurrent.Stream(end, states, told.get("keeps_newest") is True)


CHUNK, CHUNKS = 512, 16
"""The fewest tokens of a chunk, and the most chunks of a sequence, since a header lists all their arrays."""


def keeps_all(cache: PlanningCache) -> bool:
    """Return whether a cache holds every token of its sequences, so that a file may leave some to another."""
    return isinstance(cache, PositionalCache) and isinstance(cache._rule, Causal)


def _in_chunks(snapshot: Snapshot, begin: int) -> Snapshot:
    """Return the tokens of a snapshot from `begin` on in short runs.

    Each run has arrays of its own, so a reader that needs the first tokens only leaves out the others.
    """
    step = max(CHUNK, -(-(snapshot.end - begin) // CHUNKS))
    cuts = range(begin, snapshot.end, step)
    return snapshot._replace(runs=tuple(run for at in cuts for run in part_of(snapshot, at, at + step)))


def names_before(told: Any, index: int, end: int, names: Iterable[str]) -> list[str]:
    """Return which names are of the first `end` tokens of a cache, the one that `told` describes.

    There are none if the cache does not keep all tokens.
    """
    cache = mapping(told, "a cache")
    if cache.get("kind") != "causal":
        return []
    runs = [mapping(run, "a run") for run in listing(cache.get("runs"), "runs")]
    begins = [integer(run.get("begin"), "begin of a run") for run in runs]
    prefixes = tuple(f"{index}.{number}." for number, begin in enumerate(begins) if begin < end)
    return [name for name in names if name.startswith(prefixes)]


def encode(
    cache: PlanningCache, sequence: int, arrays: dict[str, mx.array], prefix: str, begin: int = 0
) -> dict[str, Any]:
    """Describe a sequence, and add its arrays to `arrays` under names that begin with `prefix`.

    Args:
        begin: a cache that keeps all tokens leaves out those before this position.
    """
    snapshot, kind = cache._snapshot(sequence), kind_of(cache)
    if isinstance(cache, WrapperCache):
        children = enumerate(cache._children)
        return kind | {"children": [encode(c, sequence, arrays, f"{prefix}{i}.") for i, c in children]}
    if isinstance(cache, PositionalCache):
        if keeps_all(cache):
            snapshot = _in_chunks(snapshot, begin)
        return kind | encode_positional(snapshot, arrays, prefix)
    if snapshot is None:
        return kind | {"end": 0}
    if isinstance(cache, EncoderCache):
        return kind | encode_encoder(snapshot, arrays, prefix)
    return kind | encode_recurrent(snapshot, arrays, prefix)


def decode(
    cache: PlanningCache,
    told: Any,
    end: int,
    arrays: Mapping[str, mx.array],
    prefix: str,
    until: int | None = None,
) -> Any:
    """Return the snapshot of `end` tokens that `encode` described, for a cache of the same kind.

    Args:
        until: of a cache that keeps all tokens, decode only what the first so many need.
    """
    encoded, expected = mapping(told, "a cache"), kind_of(cache)
    if any(encoded.get(name) != value for name, value in expected.items()):
        found = {name: encoded[name] for name in ("kind", "size", "sinks") if name in encoded}
        saved, own = (
            ", ".join(f"{name} {value}" for name, value in kind.items()) for kind in (found, expected)
        )
        raise ValueError(f"cannot load a cache of {saved or 'unknown kind'} into one of {own}")
    if isinstance(cache, WrapperCache):
        children = listing(encoded.get("children"), "children", len(cache._children))
        pairs = enumerate(zip(cache._children, children, strict=True))
        return [decode(child, part, end, arrays, f"{prefix}{i}.") for i, (child, part) in pairs]
    held = integer(encoded.get("end"), "end")
    if held != end:
        raise ValueError(f"a cache in the file holds {held} tokens, but the file is for {end}")
    if isinstance(cache, PositionalCache):
        snapshot = decode_positional(encoded, end, arrays, prefix, until)
        _check_layers(cache._store.layers.keys(), snapshot.forms.keys())
        return snapshot
    if isinstance(cache, EncoderCache):
        return decode_encoder(encoded, end, arrays, prefix)
    stream = decode_recurrent(encoded, arrays, prefix)
    if isinstance(cache, RecurrentCache) and stream:
        _check_layers(cache._forms.keys(), {layer for state in stream.states.values() for layer in state})
    return stream


def _check_layers(own: Set[int], found: Set[int]) -> None:
    """Raise ValueError if a file lacks layers that the cache has. They would be read as zeros."""
    if found and own - found:
        raise ValueError(f"the file has layers {sorted(found)}, but this cache has {sorted(own)}")


def kind_of(cache: PlanningCache) -> dict[str, Any]:
    """Return the fields that must be equal for a sequence to be loaded into a cache."""
    if isinstance(cache, PositionalCache):
        rule = cache._rule
        if isinstance(rule, Causal):
            return {"kind": "causal"}
        if isinstance(rule, Window):
            return {"kind": "window", "size": rule.size, "sinks": rule.sinks}
        if isinstance(rule, Chunk):
            return {"kind": "chunk", "size": rule.size}
        raise NotSupportedError(
            f"cannot save a cache with the rule {type(rule).__name__}; supported: Causal, Window, Chunk"
        )
    for kind, name in ((WrapperCache, "wrapper"), (EncoderCache, "encoder"), (RecurrentCache, "recurrent")):
        if isinstance(cache, kind):
            return {"kind": name}
    raise NotSupportedError(
        f"cannot save a {type(cache).__name__}; supported: caches with a visibility rule, wrapper, encoder "
        "and recurrent caches"
    )
