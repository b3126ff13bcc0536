"""Writes files atomically: a crash leaves either the old file or the complete new one.

A file is written under a temporary name in the same folder, synced to the disk, and renamed. The writer
holds a lock on the temporary file, so that others can tell a file in progress from one that a killed
process left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.part", re.DOTALL)


@contextmanager
def replacing(path: Path, ready: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends. An exception inside discards it.

    Args:
        path: the file to create or replace.
        ready: called after the new file is synced to the disk, before it is renamed.
    """
    sweep(path.parent, path.name)
    # Opening the folder may fail, so open it before anything is replaced.
    with opened_folder(path.parent) as folder:
        temporary, file = _locked(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                ready()
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # The rename survives a power failure only after the folder is synced.
        os.fsync(folder)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files that killed processes left behind.

    Files that cannot be listed or removed are skipped.

    Args:
        folder: where to look.
        name: the file whose temporary files are removed; empty for those of all files.
    """
    with suppress(OSError):
        for left in _temporary(folder, name):
            # NFS grants an exclusive lock only on a file that is open for writing. A running process
            # holds the lock, and the system releases it when the process ends.
            with suppress(OSError), left.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Yield the temporary files of one file, or of all if `name` is empty."""
    for file in os.listdir(folder):  # noqa: PTH208  # a folder may have thousands of files
        found = _TEMPORARY.fullmatch(file)
        if found and name in {"", found["name"]}:
            yield folder / file


@contextmanager
def claiming(path: Path) -> Iterator[None]:
    """Mark `path` as being written, for `is_claimed`, until the block ends."""
    temporary, file = _locked(path)
    with file:
        try:
            yield
        finally:
            temporary.unlink(missing_ok=True)


def is_claimed(path: Path) -> bool:
    """Return whether a running process is writing `path`."""
    sweep(path.parent, path.name)
    return any(_temporary(path.parent, path.name))


def _locked(path: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file for `path`, and lock it."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        file = temporary.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        # Another process may have removed the file as a leftover before it was locked.
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """Open a folder, to sync or to lock it, and return its file descriptor."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
