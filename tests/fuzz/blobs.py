"""Files of safetensors' format as bytes, with whatever head, and checksums that fit it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_kvcache.persist.container import Stored
from mlx_kvcache.persist.header import CHECKSUM, DIGEST, FORMAT, METADATA, VERSION, digest


def framed(text: bytes, body: bytes) -> bytes:
    """A head of this text, and what follows it, with the head's checksum in the last bytes."""
    head = len(text).to_bytes(8, "little") + text
    return head + body[: max(0, len(body) - DIGEST)] + digest(head)


def split(raw: bytes) -> tuple[bytes, bytes]:
    """The text of a valid file's head, and what follows it."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def plain_file(metadata: Mapping[str, Any] | None, arrays: Mapping[str, Stored]) -> bytes:
    """A safetensors file as any writer makes it."""
    fields, body = _laid(arrays)
    text = json.dumps(fields if metadata is None else {METADATA: metadata, **fields}).encode()
    return len(text).to_bytes(8, "little") + text + body


def own_file(header: Any, arrays: Mapping[str, Stored]) -> bytes:
    """A file of this package, whose checksums are all right, with any header."""
    fields, body = _laid(arrays)
    sums = {name: digest(stored.data.data).hex() for name, stored in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": json.dumps(header),
        "checksums": json.dumps(sums),
    }
    end = {"dtype": "U8", "shape": [DIGEST], "data_offsets": [len(body), len(body) + DIGEST]}
    text = json.dumps({METADATA: metadata, **fields, CHECKSUM: end}).encode()
    return framed(text, body + bytes(DIGEST))


def _laid(arrays: Mapping[str, Stored]) -> tuple[dict[str, Any], bytes]:
    fields, body = {}, b""
    for name, (dtype, shape, data) in arrays.items():
        offsets = [len(body), len(body) + data.nbytes]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        body += data.tobytes()
    return fields, body
