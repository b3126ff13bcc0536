"""What a call may raise and take, and where files are put that are tried."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx

SLACK = 8 << 20
"""Bytes that a call may take whatever its file is like."""
SHARE = 80
"""How many times a file's size a call may take. A segment has room for 64 tokens, a file may hold one."""


@cache
def folder() -> Path:
    """A folder of this process, gone at its end; in memory where there is such a place."""
    shared = Path("/dev/shm")  # noqa: S108
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def file_of(data: bytes, name: str = "cache.safetensors") -> Path:
    """A file of these bytes."""
    path = folder() / name
    path.write_bytes(data)
    return path


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Assert that MLX takes no more memory inside than a file of `size` bytes may cost."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    yield
    taken = mx.get_peak_memory() - before
    assert taken <= SHARE * size + SLACK, f"{taken} bytes taken for a file of {size}"
