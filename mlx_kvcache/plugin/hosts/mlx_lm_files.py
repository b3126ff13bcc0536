"""Prompt cache files of mlx-lm 0.31 and 0.32.

mlx-lm's own loader looks up whatever class a file names. Here a file is data: the classes are a
table, the arrays lie where the file's size allows it, and what is not understood is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from ...errors import CacheFileError
from ...persist.container import read_outline
from ...persist.files import faults_of
from ...persist.show import NO_PROMPT_CACHE, is_prompt_cache
from ...quantization import checked_codec
from ...storage.buffers import Lanes
from ...storage.codec import Packed, Plain

_MOST = 100_000
"""Entries of all lists: the names of a file's arrays say how long they are, and may say anything."""
_DEEPEST = 32
"""Lists in lists."""

_FAULTS = (
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ValueError,
    OverflowError,
    RecursionError,
)
"""What comes of data that are not what they should be: numbers that are no letters, trees too deep."""

Ranges = tuple[tuple[int, int], ...]
"""(position, length) of neighboring tokens."""


class Entry(NamedTuple):
    """A layer of a file.

    Attributes:
        name: mlx-lm's class.
        offset: the position after its last token; None for arrays, which do not know it.
        lanes: keys and values (1, n_kv_heads, S, head_dim), by rising position; None where there are none.
        ranges: which tokens they are of.
        arrays: of a recurrence.
        sizes: what a window (all that it sees, of these its first tokens) or a chunk says of itself.
    """

    name: str
    offset: int | None = None
    lanes: Lanes | None = None
    ranges: Ranges = ()
    arrays: tuple[mx.array | None, ...] = ()
    sizes: tuple[int, ...] = ()


class Foreign(NamedTuple):
    """A file of mlx-lm's: its layers, those of a `CacheList` one by one, and its writer's metadata."""

    path: Path
    entries: list[Entry]
    metadata: dict[str, Any]

    @property
    def end(self) -> int:
        """How many tokens it is for."""
        return next(entry.offset for entry in self.entries if entry.offset is not None)


def read_foreign(path: Path) -> Foreign:
    """Read a file that mlx-lm's `save_prompt_cache` wrote; all of it, for it has no checksums.

    Raises:
        CacheFileError: it is none, is damaged as far as that can be told, or is of a batch.
    """
    metadata, _, _ = read_outline(path)
    # Before any array is read: a model's weights are large.
    if not is_prompt_cache(metadata):
        raise CacheFileError(path, NO_PROMPT_CACHE)
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise CacheFileError(path, f"cannot be read: {error}") from error
    with faults_of(path):
        try:
            first, second, third = _unflattened(metadata)
            # 0.31 begins with numbers of each cache, 0.32 with what its writer added.
            if isinstance(first, list):
                states, own = _states_of_0_31(arrays, first, third), second
            else:
                states, own = _states_of_0_32(arrays, second, third), first
            entries = [entry for name, state in states for entry in _entries(name, state)]
        except _FAULTS as error:
            # Others speak of this module's names.
            told = f": {error}" if type(error) is ValueError else ""
            raise ValueError(f"not a prompt cache as mlx-lm 0.31 or 0.32 writes it{told}") from error
        offsets = {entry.offset for entry in entries if entry.offset is not None}
        if not offsets:
            raise ValueError("it holds recurrent layers only, and says not after how many tokens")
        if len(offsets) > 1:
            raise ValueError(f"its layers end at different positions: {sorted(offsets)}")
        return Foreign(path, entries, own if isinstance(own, dict) else {})


def _unflattened(named: Mapping[str, Any]) -> Any:
    """The tree of names with full stops. Raises ValueError where its lists would be longer than any are."""
    lengths: dict[str, int] = {}
    total = 0
    for name in named:
        parts = name.split(".", _DEEPEST)
        for depth, part in enumerate(parts):
            # Whatever Python reads as a number is a place to MLX, such as "1_000" or "007".
            with suppress(ValueError):
                holder = ".".join(parts[:depth])
                known = lengths.get(holder, 0)
                lengths[holder] = max(known, int(part) + 1)
                total += lengths[holder] - known
        if len(parts) > _DEEPEST or total > _MOST:
            raise ValueError(f"{name[:60]!r} is no place in a list")
    return tree_unflatten(list(named.items()))


def _states_of_0_32(arrays: Mapping[str, Any], classes: Any, scalars: Any) -> Iterator[tuple[str, Any]]:
    """Each cache's class and state."""
    values = dict(arrays)
    for place, kind in scalars[1:]:
        values[place] = _value(kind, arrays[place])
    return zip(classes, _unflattened(values), strict=True)


def _value(kind: str, array: mx.array) -> Any:
    """What 0.32 has written as an array."""
    if kind == "none":
        return None
    if kind == "scalar":
        return array.item()
    letters: Any = array.tolist()
    return "".join(map(chr, letters))


def _states_of_0_31(arrays: Mapping[str, Any], infos: Any, classes: Any) -> Iterator[tuple[str, Any]]:
    """The same, as 0.32 would have them."""
    for name, state, info in zip(classes, _unflattened(arrays), infos, strict=True):
        yield name, _modern(name, state, info)


def _modern(name: str, state: Any, info: Any) -> Any:
    """A state of 0.31 and what it wrote beside it, as a state of 0.32."""
    if name == "CacheList":
        names, infos = info
        return [
            (_modern(child, own, more), child) for child, own, more in zip(names, state, infos, strict=True)
        ]
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
            raise ValueError(f"0.31 does not write where chunks end that begin at {start}")
        return keys, values, keys.shape[2], chunk_size, start
    return (keys, values, *(numbers or [keys.shape[2]]))


def _entries(name: str, state: Any) -> Iterator[Entry]:
    """The layers of one cache."""
    if name == "CacheList":
        for own, child in state:
            yield from _entries(child, own)
        return
    if name not in _READERS:
        raise ValueError(f"{str(name)[:60]} is none of {', '.join(_READERS)}")
    entry = _READERS[name](*state)
    arrays = (*entry.arrays, *(array for lane in entry.lanes or () for array in lane.arrays))
    if any(array is not None and array.shape[0] != 1 for array in arrays):
        raise ValueError("it is of a batch")
    for offset in (entry.offset or 0, *entry.sizes):
        if type(offset) is not int or offset < 0:
            raise ValueError(f"{offset!r} is no number of tokens")
    held = sum(length for _, length in entry.ranges)
    if any(length < 1 for _, length in entry.ranges) or any(
        lane.arrays[0].ndim != 4 or lane.arrays[0].shape[2] != held for lane in entry.lanes or ()
    ):
        raise ValueError(f"{name} says that it holds {held} tokens, and has others")
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
            raise ValueError(f"{lane.dim} features in {bits} bits are not {lane.words.shape[3]} words")
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
    # The first token of a chunk sees nothing before it.
    ranges = ((start, held),) if held else ()
    return Entry("ChunkedKVCache", offset, lanes, ranges, sizes=(chunk_size,))


def _arrays(arrays: Any, left_padding: Any, lengths: Any) -> Entry:
    if left_padding is not None or lengths is not None:
        raise ValueError("it is of a batch")
    return Entry("ArraysCache", arrays=tuple(arrays))


_READERS: dict[str, Callable[..., Entry]] = {
    "KVCache": _full,
    "QuantizedKVCache": _quantized,
    "RotatingKVCache": _rotating,
    "ChunkedKVCache": _chunked,
    "ArraysCache": _arrays,
}
