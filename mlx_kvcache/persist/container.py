"""Writes and reads files of named arrays with checksums, in safetensors format.

The header is padded so that every array is aligned to the size of its elements. The header holds a
checksum for each array, and the last array is the checksum of the header, so a change of any byte is
detected. Other safetensors readers can open these files.
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
from . import header as file_header
from .atomic import replacing, sweep
from .header import SIZES, Entry

__all__ = ["SIZES", "Contents", "Entry", "NotOursError", "Stored", "read_arrays", "read_contents", "write"]


class NotOursError(CacheFileError):
    """A valid safetensors file that another program wrote. Another reader may support it."""


class Stored(NamedTuple):
    """An array as bytes.

    Attributes:
        dtype: the safetensors name, a key of `SIZES`.
        shape: the dimensions.
        data: the elements in C order, as uint8 of shape (bytes,).
    """

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Contents:
    """The header of a file, without the arrays' bytes.

    Attributes:
        path: the file.
        header: the JSON object that the writer passed.
        entries: the arrays by name, in file order.
        size: the size of the file in bytes.
        digest: the checksum of the header. It covers the arrays too, since the header holds their checksums.
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
    """Write a file atomically, and return its size in bytes.

    Args:
        path: the file; an existing one is replaced.
        header: the caller's JSON object.
        arrays: the arrays by name. The names "checksum" and "__metadata__" are reserved.
        ready: called after the new file is synced to the disk, before it replaces an existing one.

    Raises:
        CacheFileError: the file cannot be written. An existing file is left unchanged.
        TypeError, ValueError: the header is not JSON, or an array is invalid.
    """
    entries = _lay_out(arrays)
    raw = file_header.encode(header, entries)
    length = len(raw) - file_header.LENGTH
    if length > file_header.MOST:
        raise CacheFileError(path, f"the header takes {length:,} bytes; the limit is {file_header.MOST:,}")
    with _as_file_error(path, "written"):
        file_header.check_bounds(raw, "the header")
        file_header.check_bounds(json.dumps(header).encode(), "metadata field 'header'")
    size = len(raw) + sum(stored.data.nbytes for stored in arrays.values()) + file_header.DIGEST
    with _as_file_error(path, f"written ({size} bytes)"), replacing(path, ready) as file:
        file.write(raw)
        for name in entries:
            file.write(arrays[name].data.data)
        file.write(file_header.digest(raw))
    return size


def read_contents(path: Path) -> Contents:
    """Read and verify the header of a file. Arrays are not read.

    Also removes temporary files that killed writers of this file left behind.

    Raises:
        NotOursError: another program wrote this safetensors file.
        CacheFileError: the file cannot be read or is corrupt.
    """
    with _opened(path) as (file, size):
        raw = file_header.read(file, size)
        fields = file_header.parse(raw)
        if not file_header.is_ours(fields):
            raise NotOursError(path, "a safetensors file, but not written by mlx_kvcache")
        header, entries = file_header.decode(fields, len(raw), size)
        digest = file_header.digest(raw)
        if _last_bytes(file) != digest:
            raise ValueError(f"corrupt file: checksum mismatch in the header, bytes 0 to {len(raw)}")
    return Contents(path, header, entries, size, digest)


def read_outline(path: Path) -> tuple[dict[str, Any], dict[str, Entry], int]:
    """Read the metadata, the arrays' locations and the size of any safetensors file. Arrays are not read.

    Raises:
        CacheFileError: the file cannot be read, is not a safetensors file, or is corrupt.
    """
    with _opened(path) as (file, size):
        raw = file_header.read(file, size)
        fields = file_header.parse(raw)
        entries = file_header.places(fields, {}, len(raw), size)
        metadata = fields.get(file_header.METADATA)
        return metadata if isinstance(metadata, dict) else {}, entries, size


def read_bytes(path: Path, name: str, entry: Entry) -> bytes:
    """Read one array of any safetensors file without verifying it. Raises CacheFileError on failure."""
    with _opened(path) as (file, _):
        return _read(file, name, entry).tobytes()


def read_arrays(
    contents: Contents, names: Iterable[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Stored]]:
    """Read arrays one at a time. Each is read when the caller asks for it, into its own memory.

    Args:
        contents: the result of `read_contents`.
        names: the arrays to read, in this order. None reads all, in file order.
        verify: compare the checksums, which takes longer than reading.

    Raises:
        CacheFileError: the file cannot be read, an array is corrupt, or the file was replaced.
        KeyError: no array has such a name.
    """
    chosen = {name: contents.entries[name] for name in (contents.entries if names is None else names)}
    with _opened(contents.path) as (file, size):
        if size != contents.size or _last_bytes(file) != contents.digest:
            raise ValueError(
                f"replaced after its header was read: the file has {size} bytes, had {contents.size}"
            )
        for name, entry in chosen.items():
            data = _read(file, name, entry)
            if verify and file_header.digest(data.data).hex() != entry.checksum:
                array = f"array {file_header.short(name)}"
                raise ValueError(
                    f"corrupt file: checksum mismatch in {array}, bytes {entry.begin} to {entry.end}"
                )
            yield name, Stored(entry.dtype, entry.shape, data)


def _lay_out(arrays: Mapping[str, Stored]) -> dict[str, Entry]:
    """Assign offsets from the end of the header, the largest elements first so that all are aligned."""
    for name, stored in arrays.items():
        _check(name, stored)
    entries, at = dict[str, Entry](), 0
    for name in sorted(arrays, key=lambda name: (-SIZES[arrays[name].dtype], name)):
        dtype, shape, data = arrays[name]
        entries[name] = Entry(dtype, shape, at, at + data.nbytes, file_header.digest(data.data).hex())
        at += data.nbytes
    return entries


def _check(name: str, stored: Stored) -> None:
    """Raise ValueError if an array could not be read back."""
    dtype, shape, data = stored
    if name in {file_header.METADATA, file_header.CHECKSUM}:
        raise ValueError(f"array name {name!r} is reserved")
    if dtype not in SIZES:
        raise ValueError(f"array {name!r} has dtype {dtype!r}, expected one of {', '.join(SIZES)}")
    if len(shape) > file_header.DIMENSIONS or not all(0 <= n <= EXTENT for n in shape):
        raise ValueError(
            f"array {name!r} has shape {shape}; the limits are {file_header.DIMENSIONS} dimensions "
            f"of 0 to {EXTENT:,}"
        )
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise ValueError(
            f"data of array {name!r} is {data.dtype} of shape {data.shape}, expected contiguous bytes"
        )
    needed = SIZES[dtype] * math.prod(shape)
    if data.nbytes != needed:
        raise ValueError(
            f"array {name!r} has {data.nbytes} bytes, but {dtype} of shape {shape} takes {needed}"
        )


def _read(file: BufferedReader, name: str, entry: Entry) -> NDArray[np.uint8]:
    """Read the bytes of an array. Its location has been validated."""
    data = np.empty(entry.end - entry.begin, np.uint8)
    file.seek(entry.begin)
    count = file.readinto(data.data)
    if count < data.nbytes:
        raise ValueError(
            f"truncated while reading: got {count} of {data.nbytes} bytes of array {file_header.short(name)}"
        )
    return data


def _last_bytes(file: BufferedReader) -> bytes:
    """Read the end of the file, which holds the checksum of the header."""
    file.seek(-file_header.DIGEST, os.SEEK_END)
    return file.read(file_header.DIGEST)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a file, and return it with its size in bytes. Removes leftover temporary files first."""
    with _as_file_error(path, "read"):
        sweep(path.parent, path.name)
        mode = path.stat().st_mode
        # Opening a named pipe would block until another process writes to it.
        if not stat.S_ISREG(mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@contextmanager
def _as_file_error(path: Path, done: str) -> Iterator[None]:
    """Raise errors of the system and of the format as CacheFileError with the path."""
    try:
        yield
    except OSError as error:
        raise CacheFileError(path, f"cannot be {done}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CacheFileError(path, f"cannot be {done}: {error or 'out of memory'}") from error
    except ValueError as error:
        raise CacheFileError(path, str(error)) from error
