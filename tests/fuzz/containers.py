"""Files as bytes: the container, what shows it, and readers of both writers' formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kvcache import CacheFileError
from mlx_kvcache.persist.container import Stored, read_arrays, read_contents, read_outline
from mlx_kvcache.persist.files import open_file
from mlx_kvcache.persist.show import shown

from .blobs import framed, plain_file, split
from .bounds import bounded, file_of
from .samples import samples
from .target import Target

NAMES = (
    "__metadata__ format version header checksums checksum dtype shape data_offsets mlx_kvcache end caches "
    "model options has_tokens tokens kind causal window chunk encoder recurrent wrapper children size sinks "
    "runs begin length packed layers heads dims dtypes codecs states position keeps_newest F32 F16 BF16 U32 "
    "I64 U8 BOOL C64 F64 null true false NaN Infinity 1e999 2147483647 2147483648 9223372036854775808 -1"
)
WORDS = tuple(word.encode() for name in NAMES.split() for word in (name, f'"{name}"', f'\\"{name}\\"'))
MARK = b"\n--\n"
"""Between the text of a head and what follows it, in inputs whose frame is made for them."""


def check_file(data: bytes) -> None:
    """A file of these bytes is read by all readers, or refused by each."""
    path = file_of(data)
    with bounded(len(data)):
        _read(path)
    assert path.read_bytes() == data


def check_head(data: bytes) -> None:
    """The same of a head that has the length and the checksum that it should have."""
    text, _, body = data.partition(MARK)
    check_file(framed(text, body))


def _read(path: Path) -> None:
    try:
        contents = read_contents(path)
        for _, (_, shape, stored) in read_arrays(contents):
            assert stored.nbytes <= contents.size, shape
    except CacheFileError:
        pass
    with suppress(CacheFileError):
        read_outline(path)
    for verify in (True, False):
        try:
            for line in shown(path, verify):
                assert len(line) < 100_000
        except CacheFileError:
            pass
        try:
            opened = open_file(path, verify)
            mx.eval(opened.arrays)
        except CacheFileError:
            pass


def _files() -> Iterator[bytes]:
    yield from (sample.raw for sample in samples().values())
    yield plain_file({"a": "b"}, {"x": Stored("F16", (2,), np.arange(4, dtype=np.uint8))})
    yield plain_file(None, {})


def _heads() -> Iterator[bytes]:
    for raw in _files():
        text, body = split(raw)
        yield text + MARK + body


FILE = Target("file", "any bytes as a file, by every reader", check_file, _files, WORDS, 1 << 14)
HEAD = Target(
    "head", "any head with a checksum that fits, by every reader", check_head, _heads, WORDS, 1 << 14
)
