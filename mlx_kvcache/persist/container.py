"""A file of named arrays with checksums, which other readers of safetensors open, too.

The head is that of safetensors, padded so that every array is aligned to its elements. Each array has
a checksum in the head, and the head has one in a last array, so that no byte can change unseen.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arguments import EXTENT
from ..errors import CacheFileError
from . import header as heads
from .atomic import replacing, sweep
from .header import SIZES, Entry

__all__ = ["SIZES", "Contents", "Entry", "NotOursError", "Stored", "read_arrays", "read_contents", "write"]


class NotOursError(CacheFileError):
    """A safetensors file that is not a container: another format's reader may know it."""


class Stored(NamedTuple):
    """An array as bytes.

    Attributes:
        dtype: safetensors' name, as in `SIZES`.
        shape: its dimensions.
        data: its elements (bytes,), in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Contents:
    """What is in a file, without the arrays' bytes.

    Attributes:
        path: the file.
        header: what the writer said of it.
        entries: the arrays by name, in the order of the file.
        size: bytes of the file.
        digest: of the head, and so of all that it has checksums of.
    """

    path: Path
    header: dict[str, Any]
    entries: dict[str, Entry]
    size: int
    digest: bytes


def write(
    path: Path,
    header: Mapping[str, Any],
    arrays: Mapping[str, Stored],
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Write a file, whole or not at all, and return its size in bytes.

    Args:
        path: where; a file that is there is replaced.
        header: anything that JSON can hold.
        arrays: by any names but "checksum" and "__metadata__".
        ready: called when all is on the disk, before it takes the place of what is there.

    Raises:
        CacheFileError: it cannot be written; a file that was there still is.
        TypeError, ValueError: the header or an array cannot be held.
    """
    entries = _lay(arrays)
    head = heads.encode(header, entries)
    if len(head) - heads.LENGTH > heads.MOST:
        raise CacheFileError(
            path, f"its head would take {len(head):,} bytes, at most {heads.MOST:,} can be read"
        )
    with _named(path, "written"):
        for text, what in ((head, "the head"), (json.dumps(header).encode(), "the header")):
            heads.check_bounds(text, what)
    size = len(head) + sum(stored.data.nbytes for stored in arrays.values()) + heads.DIGEST
    with _named(path, f"written ({size} bytes)"), replacing(path, ready) as file:
        file.write(head)
        for name in entries:
            file.write(arrays[name].data.data)
        file.write(heads.digest(head))
    return size


def read_contents(path: Path) -> Contents:
    """What is in a file; its header is checked, its arrays are not read.

    What killed writers of this file left is removed.

    Raises:
        NotOursError: it is a safetensors file, but not one that `write` wrote.
        CacheFileError: it cannot be read, or is damaged.
    """
    with _opened(path) as (file, size):
        head = heads.read(file, size)
        fields = heads.parse(head)
        if not heads.is_ours(fields):
            raise NotOursError(path, "a safetensors file, but not one of mlx_kvcache's")
        header, entries = heads.decode(fields, len(head), size)
        digest = heads.digest(head)
        if _last(file) != digest:
            raise ValueError(f"the head is damaged: its checksum differs, bytes 0 to {len(head)}")
    return Contents(path, header, entries, size, digest)


def read_outline(path: Path) -> tuple[dict[str, Any], dict[str, Entry], int]:
    """The metadata, the arrays and the size of any writer's safetensors file; no array is read.

    Raises:
        CacheFileError: it cannot be read, is none, or its arrays do not lie where its size allows it.
    """
    with _opened(path) as (file, size):
        head = heads.read(file, size)
        fields = heads.parse(head)
        entries = heads.places(fields, {}, len(head), size)
        metadata = fields.get(heads.METADATA)
        return metadata if isinstance(metadata, dict) else {}, entries, size


def read_bytes(path: Path, name: str, entry: Entry) -> bytes:
    """One array of any writer's file, unverified. Raises CacheFileError where it cannot be read."""
    with _opened(path) as (file, _):
        return _read(file, name, entry).tobytes()


def read_arrays(
    contents: Contents, names: Iterable[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Stored]]:
    """Read arrays one by one, as the caller takes them, each into memory of its own.

    Args:
        contents: as `read_contents` returned it.
        names: which arrays, in the order in which they come; by default all, in the order of the file.
        verify: whether to compare the checksums, which costs more time than reading.

    Raises:
        CacheFileError: the file cannot be read, an array is damaged, or the file is another by now.
        KeyError: no array has such a name.
    """
    chosen = {name: contents.entries[name] for name in (contents.entries if names is None else names)}
    with _opened(contents.path) as (file, size):
        if size != contents.size or _last(file) != contents.digest:
            raise ValueError(f"replaced since its head was read: it has {size} bytes, had {contents.size}")
        for name, entry in chosen.items():
            data = _read(file, name, entry)
            if verify and heads.digest(data.data).hex() != entry.checksum:
                place = f"bytes {entry.begin} to {entry.end}"
                raise ValueError(f"array {heads.short(name)} is damaged: its checksum differs, {place}")
            yield name, Stored(entry.dtype, entry.shape, data)


def _lay(arrays: Mapping[str, Stored]) -> dict[str, Entry]:
    """Places that count from the end of the head: the largest elements first, so that all are aligned."""
    for name, stored in arrays.items():
        _check(name, stored)
    entries, at = dict[str, Entry](), 0
    for name in sorted(arrays, key=lambda name: (-SIZES[arrays[name].dtype], name)):
        dtype, shape, data = arrays[name]
        entries[name] = Entry(dtype, shape, at, at + data.nbytes, heads.digest(data.data).hex())
        at += data.nbytes
    return entries


def _check(name: str, stored: Stored) -> None:
    """Raise ValueError where an array would not be read again."""
    dtype, shape, data = stored
    if name in {heads.METADATA, heads.CHECKSUM}:
        raise ValueError(f"no array may be named {name!r}")
    if dtype not in SIZES:
        raise ValueError(f"array {name!r} is of dtype {dtype!r}, which is none of {', '.join(SIZES)}")
    if len(shape) > heads.DIMENSIONS or not all(0 <= n <= EXTENT for n in shape):
        raise ValueError(f"array {name!r} has more or larger dimensions than can be held: {shape}")
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise ValueError(f"array {name!r} is given as {data.dtype} {data.shape}, not as contiguous bytes")
    needed = SIZES[dtype] * math.prod(shape)
    if data.nbytes != needed:
        raise ValueError(f"array {name!r} has {data.nbytes} bytes, {dtype} {shape} takes {needed}")


def _read(file: BufferedReader, name: str, entry: Entry) -> NDArray[np.uint8]:
    """The bytes of an array, whose place has been found to lie inside the file."""
    data = np.empty(entry.end - entry.begin, np.uint8)
    file.seek(entry.begin)
    count = file.readinto(data.data)
    if count < data.nbytes:
        raise ValueError(
            f"truncated while it was read: array {heads.short(name)} has {count} bytes of {data.nbytes}"
        )
    return data


def _last(file: BufferedReader) -> bytes:
    """The last bytes, where the digest of the head is."""
    file.seek(-heads.DIGEST, os.SEEK_END)
    return file.read(heads.DIGEST)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A file and its size in bytes. What killed writers left beside it is removed first."""
    with _named(path, "read"):
        sweep(path.parent, path.name)
        mode = path.stat().st_mode
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@contextmanager
def _named(path: Path, done: str) -> Iterator[None]:
    """Errors of the system and of the format as those of one file."""
    try:
        yield
    except OSError as error:
        raise CacheFileError(path, f"cannot be {done}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CacheFileError(path, f"cannot be {done}: {error or 'out of memory'}") from error
    except ValueError as error:
        raise CacheFileError(path, str(error)) from error
