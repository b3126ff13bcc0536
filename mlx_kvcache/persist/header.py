"""Encodes, reads and validates the header of a cache file.

The format is safetensors: 8 bytes with the header's length, a JSON header that lists each array's dtype,
shape and offsets, then the arrays without gaps. This package's metadata adds a format version, a checksum
for each array, and the caller's own JSON. The last array is the checksum of the header itself.

Every field is validated before it is used. Faults raise ValueError; the caller adds the file name.
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
VERSION = "2"
KNOWN = ("1", VERSION)  # versions that are read
METADATA = "__metadata__"
CHECKSUM = "checksum"  # the last array: the digest of the header
LENGTH = 8  # bytes of the header's length
DIGEST = 16  # bytes of a checksum
MOST = 16 << 20  # largest header, in bytes
PARTS = 500_000  # most commas, brackets and quotation marks in JSON: enough for about 15,000 arrays
DEPTH = 64  # deepest nesting of JSON
DIMENSIONS = 64  # most dimensions of an array, as in NumPy

# Bytes of an element by safetensors dtype name. mx.load reads all but F64.
SIZES = (
    dict.fromkeys(("C64", "F64", "I64", "U64"), 8)
    | dict.fromkeys(("F32", "I32", "U32"), 4)
    | dict.fromkeys(("BF16", "F16", "I16", "U16"), 2)
    | dict.fromkeys(("BOOL", "I8", "U8"), 1)
)

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Entry(NamedTuple):
    """An array of a file: its safetensors dtype, its bytes [begin, end), and their hexadecimal digest."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: str


def digest(data: bytes | memoryview) -> bytes:
    """Return the checksum of some bytes: the first `DIGEST` bytes of their SHA-256."""
    return hashlib.sha256(data).digest()[:DIGEST]


def encode(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> bytes:
    """Return the header with its length prefix. Offsets of `entries` count from the end of the header.

    Raises ValueError if it could not be read back.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": json.dumps(header, allow_nan=False),
        "checksums": json.dumps({name: entry.checksum for name, entry in entries.items()}),
    }
    end = max((entry.end for entry in entries.values()), default=0)
    whole = {**entries, CHECKSUM: Entry("U8", (DIGEST,), end, end + DIGEST, "")}
    fields = {
        name: {"dtype": entry.dtype, "shape": [*entry.shape], "data_offsets": [entry.begin, entry.end]}
        for name, entry in whole.items()
    }
    places(fields, {}, 0, end + DIGEST)
    text = json.dumps({METADATA: metadata, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH, "little") + text


def read(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """Read the header of any safetensors file of `size` bytes.

    Returns the header with its length prefix, and its JSON object.
    """
    start = file.read(LENGTH + 1)
    if not start:
        raise ValueError("empty file: 0 bytes")
    if len(start) <= LENGTH:
        raise ValueError(f"truncated file: {size} bytes, expected at least {LENGTH + 2}")
    if start[LENGTH:] != b"{":
        raise ValueError(f"not a safetensors file: byte {LENGTH} is {start[LENGTH:]!r}, expected b'{{'")
    length = int.from_bytes(start[:LENGTH], "little")
    if not 2 <= length <= MOST:
        raise ValueError(f"corrupt file: header length is {length:,}, expected 2 to {MOST:,} bytes")
    if size < LENGTH + length:
        raise ValueError(f"truncated file: {size} bytes, but the header alone takes {LENGTH + length}")
    raw = start + file.read(length - 1)
    if len(raw) < LENGTH + length:
        raise ValueError(f"truncated while reading: got {len(raw)} of {LENGTH + length} header bytes")
    try:
        text = raw[LENGTH:].decode()
    except ValueError as error:
        raise ValueError(f"the header is not UTF-8: {error}") from error
    return raw, _object(text, "the header")


def check_bounds(text: bytes, what: str) -> None:
    """Raise ValueError if JSON is too long, has too many parts or is too deeply nested to be parsed quickly.

    Counts delimiters instead of parsing, so the check itself takes time linear in the size.
    """
    if len(text) > MOST:
        raise ValueError(f"{what} takes {len(text):,} bytes; the limit is {MOST:,}")
    # Without escapes, every quotation mark begins or ends a string. Brackets inside strings do not nest.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = sum(map(bare.count, (b",", b"[", b"{", b'"')))
    if parts > PARTS:
        raise ValueError(f"{what} has {parts:,} commas, brackets and quotation marks; the limit is {PARTS:,}")
    brackets = b"".join(bare.split(b'"')[::2]).translate(None, _NO_BRACKETS)
    deepest = max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)
    if deepest > DEPTH:
        raise ValueError(f"{what} is nested {deepest:,} levels deep; the limit is {DEPTH}")


def decode(fields: Mapping[str, Any], begin: int, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Validate a header that this package wrote.

    Args:
        fields: the JSON object of the header.
        begin: the size of the header in bytes, with its length prefix.
        size: the size of the file in bytes.

    Returns:
        The caller's JSON object, and the arrays in file order, without the header's own checksum.
    """
    metadata = fields[METADATA]
    version = metadata.get("version")
    if version not in KNOWN:
        if isinstance(version, str) and version.isdecimal():
            raise ValueError(f"format version {version:.20} is newer than {VERSION}; update mlx_kvcache")
        raise ValueError(f"unknown format version: {short(version)}, expected '{VERSION}'")
    header = _object(metadata.get("header"), "metadata field 'header'")
    checksums = _object(metadata.get("checksums"), "metadata field 'checksums'")
    if unmatched := sorted((fields.keys() - {METADATA}) ^ {*checksums, CHECKSUM}):
        raise ValueError(f"arrays without checksums, or checksums without arrays: {short(unmatched)}")
    found = places(fields, checksums, begin, size)
    own = found.pop(CHECKSUM)
    if (own.dtype, own.shape, own.end) != ("U8", (DIGEST,), size):
        raise ValueError(
            f"the header checksum is at bytes {own.begin} to {own.end}, expected the last {DIGEST} of {size}"
        )
    return header, found


def places(
    fields: Mapping[str, Any], checksums: Mapping[str, Any], begin: int, size: int
) -> dict[str, Entry]:
    """Return all arrays of a header in file order. They must fill the file from `begin` to its end."""
    entries = {
        name: _entry(name, field, begin, checksums.get(name, ""))
        for name, field in fields.items()
        if name != METADATA
    }
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = begin
    for name, entry in ordered.items():
        if entry.begin != at:
            fault = "overlaps the array before it" if entry.begin < at else "leaves a gap before it"
            raise ValueError(f"array {short(name)} {fault}: it begins at byte {entry.begin}, expected {at}")
        at = entry.end
        needed = SIZES[entry.dtype] * math.prod(entry.shape)
        if at - entry.begin != needed:
            raise ValueError(
                f"array {short(name)} has {at - entry.begin} bytes (from {entry.begin} to {at}), "
                f"but shape {short(list(entry.shape))} of {entry.dtype} takes {short(needed)}"
            )
    if at > size:
        raise ValueError(f"truncated file: {size} bytes, expected {at}")
    if at < size:
        raise ValueError(
            f"corrupt file: {size - at} extra bytes after the last array, which ends at byte {at}"
        )
    return ordered


def _entry(name: str, field: object, data: int, checksum: object) -> Entry:
    """Validate one array of the header. `data` is added to its offsets, to count from the file's start."""
    if not isinstance(field, dict):
        raise ValueError(f"the header entry of array {short(name)} is {short(field)}, expected an object")
    dtype = field.get("dtype")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"array {short(name)} has unknown dtype {short(dtype)}")
    shape = _counts(name, field.get("shape"), "the shape", EXTENT)
    if len(shape) > DIMENSIONS:
        raise ValueError(f"array {short(name)} has {len(shape)} dimensions; the limit is {DIMENSIONS}")
    offsets = _counts(name, field.get("data_offsets"), "data_offsets", 2**63 - 1)
    if len(offsets) != 2:
        raise ValueError(f"data_offsets of array {short(name)} has length {len(offsets)}, expected 2")
    if not isinstance(checksum, str):
        raise ValueError(f"the checksum of array {short(name)} is {short(checksum)}, expected a string")
    return Entry(dtype, shape, data + offsets[0], data + offsets[1], checksum)


def _counts(name: str, value: object, what: str, most: int) -> tuple[int, ...]:
    """Return a list of whole numbers, which bools are not, as a tuple."""
    if isinstance(value, list):
        for number in value:
            if type(number) is not int or not 0 <= number <= most:
                break
        else:
            return tuple(value)
    raise ValueError(
        f"{what} of array {short(name)} is {short(value)}, expected a list of whole numbers from 0 to {most}"
    )


def _object(text: object, what: str) -> dict[str, Any]:
    """Parse the JSON text of an object."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {short(text)}, expected a string")
    check_bounds(text.encode("utf-8", "surrogatepass"), what)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, expected an object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def short(value: object) -> str:
    """Return the repr of a value from a file, shortened for an error message."""
    bounded = Repr()
    bounded.maxstring = bounded.maxlong = 60
    return bounded.repr(value)
