"""Writes and reads files of named arrays with checksums, in safetensors format.

The header is padded so that every array is aligned to the size of its elements. The header holds a
checksum for each array, and the last array is the checksum of the header, so a change of any byte is
detected. Other safetensors readers can open these files.
"""

from __future__ import annotations

import json
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

from ..errors import CacheFileError
from . import header as file_header
from .atomic import replacing, sweep
from .header import CHECKSUM, DIGEST, FORMAT, LENGTH, METADATA, SIZES, Entry, digest, short

__all__ = ["SIZES", "Contents", "Entry", "NotOursError", "Stored", "read_arrays", "read_contents", "write"]


class NotOursError(CacheFileError):
    """A valid safetensors file that another program wrote. Another reader may support it."""


class Stored(NamedTuple):
    """An array as bytes: its safetensors dtype, its shape, and its elements in C order as uint8 (bytes,)."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Contents:
    """The header of a file, without the arrays' bytes.

    Attributes:
        header: the JSON object that the writer passed, or another writer's metadata.
        entries: the arrays by name, in file order.
        size: the size of the file in bytes.
        ending: the last bytes of the file: in our files the checksum of the header, which covers the arrays
            too, since the header holds their checksums.
    """

    path: Path
    header: dict[str, Any]
    entries: dict[str, Entry]
    size: int
    ending: bytes


def write(
    path: Path,
    header: Mapping[str, Any],
    arrays: Mapping[str, Stored],
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Write a file atomically, and return its size in bytes.

    Args:
        path: the file.
        header: the caller's JSON object.
        arrays: the arrays by name. The names "checksum" and "__metadata__" are reserved.
        ready: called after the new file is synced to the disk, before it replaces an existing one.

    Raises:
        CacheFileError: the file cannot be written. An existing file is left unchanged.
        TypeError, ValueError: the header is not JSON, or an array is invalid.
    """
    for name, (_, _, data) in arrays.items():
        if name in {METADATA, CHECKSUM}:
            raise ValueError(f"array name {name!r} is reserved")
        if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
            raise ValueError(
                f"data of array {name!r} is {data.dtype} of shape {data.shape}, expected contiguous bytes"
            )
    entries = _lay_out(arrays)
    raw = file_header.encode(header, entries)
    with faults_of(path):
        file_header.check_bounds(raw[LENGTH:], "the header")
        file_header.check_bounds(json.dumps(header).encode(), "metadata field 'header'")
    size = len(raw) + sum(stored.data.nbytes for stored in arrays.values()) + DIGEST
    with accessing(path, f"written ({size} bytes)"), replacing(path, ready) as file:
        file.write(raw)
        for name in entries:
            file.write(arrays[name].data.data)
        file.write(digest(raw))
    return size


def read_contents(path: Path) -> Contents:
    """Read and verify the header of a file. Arrays are not read. Removes leftover temporary files first.

    Raises:
        NotOursError: another program wrote this safetensors file.
        CacheFileError: the file cannot be read or is corrupt.
    """
    with accessing(path, "read"):
        sweep(path.parent, path.name)
    with _opened(path) as (file, size):
        raw, fields = file_header.read(file, size)
        metadata = fields.get(METADATA)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise NotOursError(path, "a safetensors file, but not written by mlx_kvcache")
        header, entries = file_header.decode(fields, len(raw), size)
        ending = _last_bytes(file, size)
        if ending != digest(raw):
            raise ValueError(f"corrupt file: checksum mismatch in the header, bytes 0 to {len(raw)}")
    return Contents(path, header, entries, size, ending)


def read_outline(path: Path) -> Contents:
    """As `read_contents` for any safetensors file. Nothing is compared with checksums."""
    with _opened(path) as (file, size):
        raw, fields = file_header.read(file, size)
        entries = file_header.places(fields, {}, len(raw), size)
        metadata = fields.get(METADATA)
        header = metadata if isinstance(metadata, dict) else {}
        return Contents(path, header, entries, size, _last_bytes(file, size))


def read_arrays(
    contents: Contents, names: Iterable[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Stored]]:
    """Read arrays one at a time. Each is read when the caller asks for it, into its own memory.

    Args:
        contents: the header of the file.
        names: the arrays to read, in this order. None reads all, in file order.
        verify: compare the checksums, which takes longer than reading.

    Raises:
        CacheFileError: the file cannot be read, an array is corrupt, or the file was replaced.
        KeyError: no array has such a name.
    """
    chosen = {name: contents.entries[name] for name in (contents.entries if names is None else names)}
    with _opened(contents.path) as (file, size):
        if size != contents.size or _last_bytes(file, size) != contents.ending:
            raise ValueError(
                f"replaced after its header was read: the file has {size} bytes, had {contents.size}"
            )
        for name, (dtype, shape, begin, end, checksum) in chosen.items():
            data = np.empty(end - begin, np.uint8)
            file.seek(begin)
            count = file.readinto(data.data)
            if count < data.nbytes:
                raise ValueError(
                    f"truncated while reading: got {count} of {data.nbytes} bytes of array {short(name)}"
                )
            if verify and digest(data.data).hex() != checksum:
                raise ValueError(
                    f"corrupt file: checksum mismatch in array {short(name)}, bytes {begin} to {end}"
                )
            yield name, Stored(dtype, shape, data)


@contextmanager
def faults_of(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Raise ValueError, and errors of the given types, as CacheFileError with the path."""
    kinds: tuple[type[Exception], ...] = (ValueError, *more)
    try:
        yield
    except kinds as error:
        raise CacheFileError(path, str(error)) from error


def _lay_out(arrays: Mapping[str, Stored]) -> dict[str, Entry]:
    """Assign offsets from the end of the header, the largest elements first so that all are aligned.

    Unknown dtypes come last; `header.encode` refuses them.
    """
    entries, at = dict[str, Entry](), 0
    for name in sorted(arrays, key=lambda name: (-SIZES.get(arrays[name].dtype, 0), name)):
        dtype, shape, data = arrays[name]
        entries[name] = Entry(dtype, shape, at, at + data.nbytes, digest(data.data).hex())
        at += data.nbytes
    return entries


def _last_bytes(file: BufferedReader, size: int) -> bytes:
    file.seek(max(0, size - DIGEST))
    return file.read(DIGEST)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a file, and return it with its size in bytes."""
    with accessing(path, "read"):
        mode = path.stat().st_mode
        # Opening a named pipe would block until another process writes to it.
        if not stat.S_ISREG(mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@contextmanager
def accessing(path: Path, done: str) -> Iterator[None]:
    """Raise errors while a file is "read" or "written" as CacheFileError with the path."""
    with faults_of(path):
        try:
            yield
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
            raise CacheFileError(path, f"cannot be {done}: {reason}") from error
