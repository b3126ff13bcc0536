"""Reads the prompt cache files of mlx-lm 0.31 and 0.32.

mlx-lm's own loader looks up any class that a file names. This reader treats files as untrusted data:
it knows the supported classes from a table, checks sizes before it allocates, and rejects everything
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from ...errors import CacheFileError
from ...persist.container import faults_of, read_outline
from ...persist.show import check_prompt_cache
from ...quantization import checked_codec
from ...storage.buffers import Lanes
from ...storage.codec import Packed, Plain

_MAX_ENTRIES = 100_000
"""Maximum number of entries of all lists together: the array names in a file set their lengths."""
_MAX_DEPTH = 32

_BATCH = "it holds a batch; only single sequences are supported"

_PARSE_ERRORS = (TypeError, LookupError, AttributeError, ValueError, OverflowError, RecursionError)
"""Errors that parsing a corrupt file can raise."""

Ranges = tuple[tuple[int, int], ...]
"""(first position, length) of each run of consecutive tokens."""


class Entry(NamedTuple):
    """One layer of a file.

    Attributes:
        name: the name of mlx-lm's class.
        offset: the position after its last token; None for recurrent states, which do not record it.
        lanes: keys and values (1, n_kv_heads, S, head_dim), in order of position; None if empty.
        ranges: the tokens that `lanes` holds.
        arrays: the states of a recurrent layer.
        sizes: (max_size, keep) of a sliding window, (chunk_size,) of chunks, else empty.
    """

    name: str
    offset: int | None = None
    lanes: Lanes | None = None
    ranges: Ranges = ()
    arrays: tuple[mx.array | None, ...] = ()
    sizes: tuple[int, ...] = ()


class Foreign(NamedTuple):
    """The layers of a file of mlx-lm; those of a `CacheList` follow each other."""

    path: Path
    entries: list[Entry]

    @property
    def end(self) -> int:
        """The number of tokens that the file's cache has read."""
        return next(entry.offset for entry in self.entries if entry.offset is not None)


def read_foreign(path: Path) -> Foreign:
    """Read a file written by mlx-lm's `save_prompt_cache`.

    Reads all arrays at once. The format has no checksums, so only some corruption is detected.

    Raises:
        CacheFileError: the file is not a prompt cache, is corrupt, or holds a batch.
    """
    outline = read_outline(path)
    # Checked before the arrays are read: a file of model weights is large.
    check_prompt_cache(outline)
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise CacheFileError(path, f"corrupt file: {error}") from error
    with faults_of(path):
        try:
            first, second, third = _unflattened(outline.header)
            # 0.31 starts with the numbers of each cache, 0.32 with the caller's metadata.
            if isinstance(first, list):
                states = _as_0_32("CacheList", _unflattened(arrays), (third, first))
            else:
                states = _states_of_0_32(arrays, second, third)
            entries = list(_entries("CacheList", states))
        except _PARSE_ERRORS as error:
            # Messages of other errors name internals of this module.
            reason = f": {error}" if type(error) in (ValueError, OverflowError) else ""
            raise ValueError(
                f"corrupt or unsupported file: not in the format of mlx-lm 0.31 or 0.32{reason}"
            ) from error
        offsets = {entry.offset for entry in entries if entry.offset is not None}
        if not offsets:
            raise ValueError(
                "unsupported file: it holds only recurrent layers, which do not record the number of tokens"
            )
        if len(offsets) > 1:
            raise ValueError(f"corrupt file: layers end at different positions: {sorted(offsets)}")
        return Foreign(path, entries)


def _unflattened(named: Mapping[str, Any]) -> Any:
    """Build the tree that dotted names describe. Raises ValueError if its lists are too long or too deep."""
    lengths: dict[str, int] = {}
    total = 0
    for name in named:
        parts = name.split(".", _MAX_DEPTH)
        for depth, part in enumerate(parts):
            # MLX accepts every index that int() accepts, such as "1_000" or "007".
            with suppress(ValueError):
                holder = ".".join(parts[:depth])
                known = lengths.get(holder, 0)
                lengths[holder] = max(known, int(part) + 1)
                total += lengths[holder] - known
        if len(parts) > _MAX_DEPTH or total > _MAX_ENTRIES:
            raise ValueError(
                f"array name {name[:60]!r} exceeds {_MAX_DEPTH} nested lists or {_MAX_ENTRIES:,} list entries"
            )
    return tree_unflatten(list(named.items()))


def _states_of_0_32(arrays: Mapping[str, Any], classes: Any, scalars: Any) -> Iterator[tuple[Any, str]]:
    """Yield the state and the class of each cache."""
    values = dict(arrays)
    for place, kind in scalars[1:]:
        # 0.32 writes numbers, strings and None as arrays.
        if kind == "none":
            values[place] = None
        elif kind == "scalar":
            values[place] = arrays[place].item()
        else:
            values[place] = "".join(map(chr, arrays[place].tolist()))
    return zip(_unflattened(values), classes, strict=True)


def _as_0_32(name: str, state: Any, info: Any) -> Any:
    """Convert a state of 0.31 and its separate numbers to a state of 0.32."""
    if name == "CacheList":
        names, infos = info
        children = zip(names, state, infos, strict=True)
        return [(_as_0_32(child, own, more), child) for child, own, more in children]
    if name == "ArraysCache":
        return state, None, None
    keys, values = state
    numbers = [int(number) for number in info] if info else []
    if name == "RotatingKVCache":
        keep, max_size, offset, index = numbers
        return keys, values, offset, keep, max_size, index
    if name == "ChunkedKVCache":
        chunk_size, start = numbers
        if start:
            raise ValueError(f"mlx-lm 0.31 does not record the end of chunks that start at position {start}")
        return keys, values, keys.shape[2], chunk_size, start
    return (keys, values, *(numbers or [keys.shape[2]]))


def _entries(name: str, state: Any) -> Iterator[Entry]:
    """Yield the layers of a cache."""
    if name == "CacheList":
        for own, child in state:
            yield from _entries(child, own)
        return
    if name not in _READERS:
        raise ValueError(f"class {str(name)[:60]} is not one of {', '.join(_READERS)}")
    entry = _READERS[name](*state)
    lanes = entry.lanes or ()
    arrays = (*entry.arrays, *(array for lane in lanes for array in lane.arrays))
    if any(array is not None and array.shape[0] != 1 for array in arrays):
        raise ValueError(_BATCH)
    for offset in (entry.offset or 0, *entry.sizes):
        if type(offset) is not int or offset < 0:
            raise ValueError(f"number of tokens is {offset!r}, expected an integer of 0 or more")
    held = sum(length for _, length in entry.ranges)
    shapes = [lane.arrays[0].shape for lane in lanes]
    if any(length < 1 for _, length in entry.ranges) or any(len(s) != 4 or s[2] != held for s in shapes):
        raise ValueError(f"arrays of {name} do not have the {held} tokens that it records")
    yield entry


def _full(keys: Any, values: Any, offset: int) -> Entry:
    if keys is None or not offset:
        return Entry("KVCache", 0)
    lanes = Plain(keys[:, :, :offset]), Plain(values[:, :, :offset])
    return Entry("KVCache", offset, lanes, ((0, offset),))


def _quantized(keys: Any, values: Any, offset: int, group_size: int, bits: int) -> Entry:
    if keys is None or not offset:
        return Entry("KVCache", 0)
    codec = checked_codec(bits, group_size)
    lanes = tuple(Packed.of((part[:, :, :offset] for part in parts), codec) for parts in (keys, values))
    for lane in lanes:
        if lane.words.shape[3] * 32 != lane.dim * bits or lane.biases.shape != lane.scales.shape:
            raise ValueError(
                f"quantized array has {lane.words.shape[3]} words, "
                f"expected {lane.dim} features of {bits} bits"
            )
    return Entry("KVCache", offset, (lanes[0], lanes[1]), ((0, offset),))


def _rotating(keys: Any, values: Any, offset: int, keep: int, max_size: int, index: int) -> Entry:
    sizes = max_size, keep
    if keys is None or not offset:
        return Entry("RotatingKVCache", 0, sizes=sizes)

    def in_order(ring: mx.array) -> mx.array:
        if index == ring.shape[2]:
            return ring
        if index < offset:
            return mx.concatenate([ring[:, :, :keep], ring[:, :, index:], ring[:, :, keep:index]], axis=2)
        return ring[:, :, :index]

    lanes = Plain(in_order(keys)), Plain(in_order(values))
    held = lanes[0].array.shape[2]
    newest = (offset - held + keep, held - keep)
    ranges = ((0, offset),) if held >= offset else tuple(r for r in ((0, keep), newest) if r[1])
    return Entry("RotatingKVCache", offset, lanes, ranges, sizes=sizes)


def _chunked(keys: Any, values: Any, offset: int, chunk_size: int, start: int) -> Entry:
    if keys is None or not offset:
        return Entry("ChunkedKVCache", 0, sizes=(chunk_size,))
    held = offset - start
    lanes = Plain(keys[:, :, :held]), Plain(values[:, :, :held])
    # Nothing may be held: the first token of a chunk sees nothing before it.
    ranges = ((start, held),) if held else ()
    return Entry("ChunkedKVCache", offset, lanes, ranges, sizes=(chunk_size,))


def _arrays(arrays: Any, left_padding: Any, lengths: Any) -> Entry:
    if left_padding is not None or lengths is not None:
        raise ValueError(_BATCH)
    return Entry("ArraysCache", arrays=tuple(arrays))


_READERS: dict[str, Callable[..., Entry]] = {
    "KVCache": _full,
    "QuantizedKVCache": _quantized,
    "RotatingKVCache": _rotating,
    "ChunkedKVCache": _chunked,
    "ArraysCache": _arrays,
}
