"""Files that are not as they should be: each is refused with a reason, and no damage passes unseen."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import CacheFileError
from mlx_kvcache.persist.container import NotOursError, read_arrays, read_contents
from mlx_kvcache.persist.header import MOST, digest

from .samples import assert_same, few, load

Fields = dict[str, Any]
"""The head of a file."""


def fields_of(raw: bytes) -> Any:
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_text(raw: bytes, text: bytes) -> bytes:
    """The file with another head, and the checksum that this head should have."""
    head = len(text).to_bytes(8, "little") + text
    return head + raw[8 + int.from_bytes(raw[:8], "little") : -16] + digest(head)


def with_fields(raw: bytes, change: Callable[[Fields], object]) -> bytes:
    fields = fields_of(raw)
    change(fields)
    return with_text(raw, json.dumps(fields).encode())


def refusal(path: Path, raw: bytes) -> str:
    """Why a file of these bytes is refused."""
    path.write_bytes(raw)
    with pytest.raises(CacheFileError) as error:
        load(path)
    assert str(error.value) == f"{path}: {error.value.reason}"
    assert len(error.value.reason) < 400
    return error.value.reason


def metadata(key: str, value: Any) -> Callable[[Fields], object]:
    return lambda fields: fields["__metadata__"].__setitem__(key, value)


def field(key: str, value: Any, name: str = "array 0") -> Callable[[Fields], object]:
    return lambda fields: fields[name].__setitem__(key, value)


def moved(begin: int, end: int, name: str = "array 0") -> Callable[[Fields], object]:
    """Other offsets, relative to the true ones."""

    def change(fields: Fields) -> None:
        offsets = fields[name]["data_offsets"]
        fields[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


def checksums(change: Callable[[dict[str, Any]], object]) -> Callable[[Fields], object]:
    def changed(fields: Fields) -> None:
        sums = json.loads(fields["__metadata__"]["checksums"])
        change(sums)
        fields["__metadata__"]["checksums"] = json.dumps(sums)

    return changed


def shifted(fields: Fields) -> None:
    """All one byte further on."""
    for name, value in fields.items():
        if name != "__metadata__":
            value["data_offsets"] = [offset + 1 for offset in value["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata("version", "3"), "format version 3 is newer than 2; update mlx_kvcache"),
        (metadata("version", "1.5"), "unknown format version: '1.5', expected '2'"),
        (metadata("version", 1), "unknown format version: 1, expected '2'"),
        (lambda fields: fields["__metadata__"].pop("version"), "unknown format version: None"),
        (metadata("header", None), "metadata field 'header' is None, expected a string"),
        (metadata("header", "[1]"), r"metadata field 'header' is \[1\], expected an object"),
        (metadata("header", "{"), "metadata field 'header' is not valid JSON: .*line 1 column 2"),
        (metadata("header", '{"x": NaN}'), "metadata field 'header' is not valid JSON: NaN is not a"),
        (metadata("header", '{"x": 1' + "0" * 5000 + "}"), "metadata field 'header' is not valid JSON"),
        (
            metadata("header", '{"x": ' + "[" * 100_000),
            "metadata field 'header' is nested 100,001 levels deep",
        ),
        (metadata("checksums", {}), "metadata field 'checksums' is {}, expected a string"),
        (metadata("checksums", "1"), "metadata field 'checksums' is 1, expected an object"),
        (checksums(lambda sums: sums.pop("array 3")), r"arrays without checksums.*: \['array 3'\]"),
        (checksums(lambda sums: sums.update(x="")), r"checksums without arrays: \['x'\]"),
        (
            checksums(lambda sums: sums.update({"array 0": 7})),
            "the checksum of array 'array 0' is 7, expected a string",
        ),
        (checksums(lambda sums: sums.update({"array 0": "0" * 32})), "checksum mismatch in array 'array 0'"),
        (lambda fields: fields.pop("array 0"), r"checksums without arrays: \['array 0'\]"),
        (lambda fields: fields.pop("checksum"), r"checksums, or checksums without arrays: \['checksum'\]"),
        (
            lambda fields: fields.update({"array 0": [1]}),
            r"the header entry of array 'array 0' is \[1\], expected an obj",
        ),
        (field("dtype", "F8_E4M3"), "array 'array 0' has unknown dtype 'F8_E4M3'"),
        (field("dtype", ["F32"]), r"array 'array 0' has unknown dtype \['F32'\]"),
        (
            field("dtype", "F16"),
            r"has 24 bytes \(from \d+ to \d+\), but shape \[2, 3\] of F16 takes 12",
        ),
        (field("shape", [2, 4]), r"has 24 bytes .* shape \[2, 4\] of F32 takes 32"),
        (field("shape", [2**31 - 1] * 64), "has 24 bytes .* shape .* of F32 takes"),
        (field("shape", [1] * 62 + [2, 3, 1]), "array 'array 0' has 65 dimensions; the limit is 64"),
        (
            field("shape", [-2, -3]),
            r"the shape of array 'array 0' is \[-2, -3\], expected a list of whole numbers",
        ),
        (
            field("shape", [2**31]),
            r"is \[2147483648\], expected a list of whole numbers from 0 to 2147483647",
        ),
        (field("shape", [2.0, 3]), r"is \[2.0, 3\], expected a list of whole numbers"),
        (field("shape", [True, 6]), r"is \[True, 6\], expected a list of whole numbers"),
        (field("shape", "6"), "the shape of array 'array 0' is '6', expected a list"),
        (field("shape", None), "the shape of array 'array 0' is None, expected a list"),
        (field("data_offsets", [0]), "data_offsets of array 'array 0' has length 1, expected 2"),
        (
            field("data_offsets", [False, 24]),
            r"data_offsets of array 'array 0' is \[False, 24\], expected a list",
        ),
        (field("data_offsets", [0, 2**64]), r"is \[0, 18446744073709551616\], expected a list"),
        (field("data_offsets", [0, 10**4000]), "data_offsets of array 'array 0' is .*, expected a list"),
        (field("data_offsets", {}), "data_offsets of array 'array 0' is {}, expected a list"),
        (moved(-8, -8), "array 'array [03]' overlaps the array before it: it begins at byte"),
        (moved(0, 8), r"array 'array 0' has 32 bytes .* takes 24"),
        (moved(24, -24), r"array 'array 0' leaves a gap before it"),
        (moved(0, -8), "array 'array 0' has 16 bytes .* takes 24"),
        (moved(10**12, 10**12, "checksum"), "'checksum' leaves a gap before it: it begins at byte 10000000"),
        (shifted, "array 'array 3' leaves a gap before it"),
        (field("shape", [4, 4], "checksum"), "the header checksum is at bytes"),
        (
            lambda fields: fields.update({"checksum": fields["array 5"], "array 5": fields["checksum"]}),
            "the header checksum is at",
        ),
    ],
)
def test_bad_heads(path: Path, change: Callable[[Fields], object], message: str) -> None:
    """Each with a checksum as if it had been written so."""
    reason = refusal(path, with_fields(path.read_bytes(), change))
    assert re.search(message, reason), reason


def head_size(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def flipped(raw: bytes, at: int) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "empty file: 0 bytes"),
        (lambda raw: raw[:8], "truncated file: 8 bytes, expected at least 10"),
        (lambda raw: raw[:100], r"truncated file: 100 bytes, but the header alone takes \d+"),
        (lambda raw: raw[:-17], r"truncated file: \d+ bytes, expected \d+"),
        (lambda raw: raw[:-1], r"truncated file: \d+ bytes, expected \d+"),
        (
            lambda raw: raw + b"ab",
            r"corrupt file: 2 extra bytes after the last array, which ends at byte \d+",
        ),
        (lambda raw: raw + raw, r"\d+ extra bytes after"),
        (lambda raw: raw[8:], "not a safetensors file: byte 8 is "),
        (lambda raw: pickle.dumps(list(range(100))), "not a safetensors file: byte 8 is "),
        (lambda raw: bytes(1000), r"not a safetensors file: byte 8 is b'\\x00', expected b'{'"),
        (lambda raw: bytes(8) + raw[8:], "corrupt file: header length is 0, expected 2 to 16,777,216 bytes"),
        (
            lambda raw: b"\xff" * 8 + raw[8:],
            "corrupt file: header length is 18,446,744,073,709,551,615, expected",
        ),
        (
            lambda raw: (2000).to_bytes(8, "little") + raw[8:],
            r"truncated file: .* the header alone takes 2008",
        ),
        (lambda raw: with_text(raw, b'{"a": }'), "the header is not valid JSON: .*char 6"),
        (lambda raw: with_text(raw, b'{"a": "\xff"}'), "the header is not UTF-8: .*position 7"),
        (lambda raw: with_text(raw, '{"a": 1}'.encode("utf-16-le")), "the header is not valid JSON"),
        (lambda raw: with_text(raw, b'{"a": ' + b"[" * 100_000), "the header is nested 100,001 levels deep"),
        (lambda raw: with_text(raw, b'{"a": -Infinity}'), "the header is not valid JSON: -Infinity is not"),
        (lambda raw: with_text(raw, b'{"a": 1' + b"0" * 9999 + b"}"), "the header is not valid JSON"),
        (lambda raw: flipped(raw, head_size(raw) - 1), "the header is not valid JSON"),
        (
            lambda raw: raw[: head_size(raw) - 1] + b"\t" + raw[head_size(raw) :],
            "checksum mismatch in the header",
        ),
        (lambda raw: flipped(raw, -1), r"corrupt file: checksum mismatch in the header, bytes 0 to \d+$"),
        (
            lambda raw: flipped(raw, head_size(raw)),
            r"checksum mismatch in array 'array 3', bytes \d+ to \d+$",
        ),
    ],
)
def test_bad_bytes(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    reason = refusal(path, damage(path.read_bytes()))
    assert re.search(message, reason), reason


def test_a_damaged_array_leaves_the_others(path: Path) -> None:
    raw = path.read_bytes()
    begin, end = read_contents(path).entries["array 0"][2:4]
    path.write_bytes(flipped(raw, end - 1))
    contents = read_contents(path)
    with pytest.raises(CacheFileError, match=rf"mismatch in array 'array 0', bytes {begin} to {end}"):
        list(read_arrays(contents, ["array 0"]))
    others = few().keys() - {"array 0"}
    assert_same(dict(read_arrays(contents, others)), {name: few()[name] for name in others})
    unverified = dict(read_arrays(contents, verify=False))
    assert unverified["array 0"].data.tobytes() == flipped(few()["array 0"].data.tobytes(), -1)


def test_files_of_others_are_told_apart(tmp_path: Path) -> None:
    """With no metadata, and with some of another format."""
    path = tmp_path / "a.safetensors"
    for given in ({}, {"format": "mlx"}, {"0": "x", "checksums": "{}"}):
        mx.save_safetensors(str(path), {"x": mx.zeros(3)}, given)
        with pytest.raises(NotOursError, match="a safetensors file, but not written by mlx_kvcache"):
            read_contents(path)
    again = pickle.loads(pickle.dumps(NotOursError(path, "why")))  # noqa: S301
    assert (type(again), again.path, again.reason) == (NotOursError, path, "why")


@pytest.mark.parametrize("kind", ["replace", "truncate", "insert", "append", "remove"])
def test_no_damage_passes_unseen(path: Path, kind: str) -> None:
    """1,000 random ones of a small file; nothing but a CacheFileError comes of them."""
    raw, rng = path.read_bytes(), random.Random(kind)
    for _ in range(600 if kind == "replace" else 100):
        at, some = rng.randrange(len(raw)), rng.randbytes(rng.randint(1, 4))
        changed = {
            "replace": raw[:at] + some[: len(raw) - at] + raw[at + len(some) :],
            "truncate": raw[:at],
            "insert": raw[:at] + some + raw[at:],
            "append": raw + some,
            "remove": raw[:at] + raw[at + len(some) :],
        }[kind]
        if changed != raw:
            refusal(path, changed)


def test_no_flipped_bit_passes_unseen(path: Path) -> None:
    raw = path.read_bytes()
    for at in range(len(raw)):
        refusal(path, flipped(raw, at))


def claim(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: length.to_bytes(8, "little") + raw[8:]


def lie(name: str, key: str, value: list[int]) -> Callable[[bytes], bytes]:
    return lambda raw: with_fields(raw, field(key, value, name))


@pytest.mark.parametrize(
    "damage",
    [
        claim(MOST),
        claim(2**63),
        claim(2**64 - 1),
        lie("array 0", "shape", [2**31 - 1, 2**31 - 1]),
        lie("array 0", "shape", [2**31 - 1] * 10_000),
        lie("array 0", "data_offsets", [0, 2**40]),
        lie("checksum", "data_offsets", [2**40, 2**40 + 16]),
        lie("checksum", "shape", [2**31 - 1]),
    ],
)
def test_nothing_is_allocated_on_the_word_of_a_file(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(CacheFileError):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_long_head_is_not_read(path: Path) -> None:
    """Of a file that is as long as it says, too: here with a hole, which takes no room on the disk."""
    path.write_bytes((MOST + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, MOST + 100)
    tracemalloc.start()
    with pytest.raises(CacheFileError, match=f"header length is {MOST + 1:,}, expected"):
        read_contents(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
