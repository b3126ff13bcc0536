"""Files that are there whole or not at all, whatever ends the process that writes them."""

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
    """A temporary file beside `path` that takes its place at the end; an exception inside removes it.

    Args:
        ready: called when it is on the disk, before it takes its place.

    Raises:
        OSError: as opening, writing and renaming do.
    """
    sweep(path.parent, path.name)
    # The folder is opened first: where that is refused, nothing has been replaced yet.
    with _folder(path.parent) as folder:
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
        # Lets the rename survive a power cut.
        os.fsync(folder)


def sweep(folder: Path, name: str = "") -> None:
    """Remove the temporary files that killed processes left, of one file or of the whole folder.

    A living process holds a lock on its own, which ends with it in any way. What may not be listed
    or removed stays.
    """
    with suppress(OSError):
        for left in _temporary(folder, name):
            _remove(left)


def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """The temporary files of one file, or of all."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and name in {"", found["name"]}:
            yield path


def _remove(left: Path) -> None:
    """Remove a temporary file if nobody holds its lock."""
    # Opened for writing, since NFS gives no exclusive lock otherwise.
    with suppress(OSError), left.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left.unlink()


@contextmanager
def claiming(path: Path) -> Iterator[None]:
    """Show others that `path` is being made, before there is anything of it and until the end.

    Raises:
        OSError: as opening does.
    """
    temporary, file = _locked(path)
    with file:
        try:
            yield
        finally:
            temporary.unlink(missing_ok=True)


def is_claimed(path: Path) -> bool:
    """Whether a living process is making or writing `path`."""
    sweep(path.parent, path.name)
    return any(_temporary(path.parent, path.name))


def _locked(path: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file for `path`, and a lock on it."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        file = temporary.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        # Between opening and locking, somebody may have taken it for one that was left.
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()


@contextmanager
def _folder(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
