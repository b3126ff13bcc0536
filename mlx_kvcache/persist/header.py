"""The head of a container: JSON that says what lies where, of which nothing is believed unchecked.

In safetensors' format the JSON follows 8 bytes with its length, and the arrays follow without holes.
Every fault is a ValueError whose message is for the user; the caller knows the name of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from itertools import accumulate
from reprlib import Repr
from typing import Any, BinaryIO, NamedTuple

from ..arguments import EXTENT

FORMAT = "mlx_kvcache"
VERSION = "1"
METADATA = "__metadata__"
CHECKSUM = "checksum"  # the last array: the digest of the head
LENGTH = 8
DIGEST = 16
MOST = 16 << 20  # bytes of JSON
PARTS = 500_000  # commas, brackets and quotation marks in it: those of some 15,000 arrays
DEPTH = 64  # brackets in brackets
DIMENSIONS = 64  # of an array, as in NumPy

# Bytes of an element, by safetensors' name. All but F64 are read by mx.load, too.
SIZES = {
    name: size
    for size, names in {
        8: "C64 F64 I64 U64",
        4: "F32 I32 U32",
        2: "BF16 F16 I16 U16",
        1: "BOOL I8 U8",
    }.items()
    for name in names.split()
}


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Entry(NamedTuple):
    """An array in a file.

    Attributes:
        dtype: safetensors' name, as in `SIZES`.
        shape: its dimensions.
        begin: offset of its first byte in the file.
        end: offset after its last byte.
        checksum: hexadecimal digest of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: str


def digest(data: bytes | memoryview) -> bytes:
    """DIGEST bytes that tell whether others have changed."""
    return hashlib.sha256(data).digest()[:DIGEST]


def encode(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> bytes:
    """The length and the JSON, for entries in the order of the file that count from the end of the head."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": json.dumps(header, allow_nan=False),
        "checksums": json.dumps({name: entry.checksum for name, entry in entries.items()}),
    }
    end = max((entry.end for entry in entries.values()), default=0)
    whole = {**entries, CHECKSUM: Entry("U8", (DIGEST,), end, end + DIGEST, "")}
    fields = {
        name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
        for name, entry in whole.items()
    }
    text = json.dumps({METADATA: metadata, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH, "little") + text


def read(file: BinaryIO, size: int) -> bytes:
    """The length and the JSON, from the start of a file of `size` bytes.

    Raises:
        ValueError: the file is truncated, or not of safetensors' format.
    """
    start = file.read(LENGTH + 1)
    if not start:
        raise ValueError("empty: it has 0 bytes")
    if len(start) <= LENGTH:
        raise ValueError(f"truncated: it has {size} bytes, a head takes at least {LENGTH + 2}")
    if start[LENGTH:] != b"{":
        raise ValueError(f"not a safetensors file: byte {LENGTH} is {start[LENGTH:]!r} instead of b'{{'")
    length = int.from_bytes(start[:LENGTH], "little")
    if not 2 <= length <= MOST:
        raise ValueError(f"corrupt: the header's length is {length:,}, expected 2 to {MOST:,} bytes")
    if size < LENGTH + length:
        raise ValueError(f"truncated: it has {size} bytes, its head alone takes {LENGTH + length}")
    head = start + file.read(length - 1)
    if len(head) < LENGTH + length:
        raise ValueError(f"truncated while it was read: its head has {len(head)} bytes of {LENGTH + length}")
    return head


def check_bounds(text: bytes, what: str) -> None:
    """Raise ValueError for JSON that would take long to parse, which counting and no parsing finds out."""
    # Quotation marks are then the ends of strings, in which brackets do not count.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = sum(map(bare.count, (b",", b"[", b"{", b'"')))
    if parts > PARTS:
        raise ValueError(
            f"{what} has {parts:,} commas, brackets and quotation marks, at most {PARTS:,} are read"
        )
    brackets = b"".join(bare.split(b'"')[::2]).translate(None, _NO_BRACKETS)
    deepest = max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)
    if deepest > DEPTH:
        raise ValueError(f"{what} is nested too deeply: {deepest:,} brackets, at most {DEPTH} are read")


def parse(head: bytes) -> dict[str, Any]:
    """The JSON of any safetensors file. Raises ValueError where it is invalid."""
    try:
        text = head[LENGTH:].decode()
    except ValueError as error:
        raise ValueError(f"the head is not UTF-8: {error}") from error
    return _object(text, "the head")


def is_ours(fields: Mapping[str, Any]) -> bool:
    """Whether a parsed head is that of a container, of whatever version."""
    metadata = fields.get(METADATA)
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def decode(fields: Mapping[str, Any], begin: int, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The caller's header, and the arrays but for the head's own checksum, in the order of the file.

    Args:
        fields: the parsed head, which `is_ours`.
        begin: bytes of the head.
        size: bytes of the file.

    Raises:
        ValueError: something is not as `encode` writes it, or not where the size allows it.
    """
    metadata = fields[METADATA]
    _check_version(metadata.get("version"))
    header = _object(metadata.get("header"), "the header")
    checksums = _object(metadata.get("checksums"), "the list of checksums")
    if unmatched := sorted((fields.keys() - {METADATA}) ^ {*checksums, CHECKSUM}):
        raise ValueError(f"arrays without checksums, or checksums without arrays: {short(unmatched)}")
    found = places(fields, checksums, begin, size)
    own = found.pop(CHECKSUM)
    if (own.dtype, own.shape, own.end) != ("U8", (DIGEST,), size):
        raise ValueError(f"the head's checksum is at bytes {own.begin} to {own.end}, not the last {DIGEST}")
    return header, found


def places(
    fields: Mapping[str, Any], checksums: Mapping[str, Any], begin: int, size: int
) -> dict[str, Entry]:
    """All arrays of a parsed head, in the order of the file. Raises ValueError as `decode` does."""
    arrays = {name: field for name, field in fields.items() if name != METADATA}
    entries = [(name, _entry(name, field, begin, checksums.get(name, ""))) for name, field in arrays.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_places(entries, begin, size)
    return dict(entries)


def _check_version(version: object) -> None:
    if version == VERSION:
        return
    if isinstance(version, str) and version.isdecimal():
        raise ValueError(f"written by a newer version: {version:.20}, this one reads {VERSION}")
    raise ValueError(f"of an unknown version: {short(version)}, this one reads {VERSION}")


def _entry(name: str, field: object, data: int, checksum: object) -> Entry:
    """An array as the head describes it, its offsets moved to count from the start of the file."""
    array = f"array {short(name)}"
    if not isinstance(field, dict):
        raise ValueError(f"{array} is described by {short(field)}, not by an object")
    dtype = field.get("dtype")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{array} is of an unknown dtype, {short(dtype)}")
    shape = _counts(field.get("shape"), f"the shape of {array}", EXTENT)
    if len(shape) > DIMENSIONS:
        raise ValueError(f"{array} has {len(shape)} dimensions, at most {DIMENSIONS} are read")
    offsets = _counts(field.get("data_offsets"), f"the place of {array}", 2**63 - 1)
    if len(offsets) != 2:
        raise ValueError(f"the place of {array} is given by {len(offsets)} offsets instead of 2")
    if not isinstance(checksum, str):
        raise ValueError(f"the checksum of {array} is {short(checksum)}, not text")
    return Entry(dtype, shape, data + offsets[0], data + offsets[1], checksum)


def _check_places(entries: list[tuple[str, Entry]], begin: int, size: int) -> None:
    """Arrays, sorted by their offsets, fill the file from `begin` to its end."""
    at = begin
    for name, entry in entries:
        array = f"array {short(name)}"
        if entry.begin != at:
            fault = "overlaps what is before it" if entry.begin < at else "leaves a hole before it"
            raise ValueError(f"{array} {fault}: it begins at byte {entry.begin} instead of {at}")
        needed = SIZES[entry.dtype] * math.prod(entry.shape)
        if entry.end - entry.begin != needed:
            raise ValueError(
                f"{array} takes {entry.end - entry.begin} bytes (from {entry.begin} to {entry.end}), "
                f"but its shape {short(list(entry.shape))} of {entry.dtype} takes {short(needed)}"
            )
        at = entry.end
    if at > size:
        raise ValueError(f"truncated: it has {size} bytes of {at}")
    if at < size:
        raise ValueError(f"{size - at} bytes too many after the last array, which ends at byte {at}")


def _counts(value: object, what: str, most: int) -> tuple[int, ...]:
    """A list of whole numbers from 0 to `most`; a bool, which is an int to Python, is none."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= most for n in value):
        raise ValueError(f"{what} is {short(value)}, not a list of whole numbers from 0 to {most}")
    return tuple(value)


def _object(text: object, what: str) -> dict[str, Any]:
    """JSON text of an object."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {short(text)}, not text")
    check_bounds(text.encode("utf-8", "surrogatepass"), what)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, not an object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def short(value: object) -> str:
    """What a file holds, for a message: of bounded length, width and depth."""
    bounded = Repr()
    bounded.maxstring = bounded.maxlong = 60
    return bounded.repr(value)
