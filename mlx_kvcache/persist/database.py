"""A database that several threads and processes use at once, and that is begun anew where it is damaged."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import CacheFileError

_PATIENCE = 30.0
"""Seconds to wait for other processes' changes, which take milliseconds each."""


class _Connection(NamedTuple):
    raw: sqlite3.Connection
    inode: int


class Database:
    """Connections to one SQLite file, each used by one thread at a time.

    A damaged file gets the ending `.damaged`, for whoever wants to look into it.

    Args:
        path: the file; its folder is made where it is missing, and errors name the folder.
        tables: statements that make what is in a new one.
        version: of the tables. A file with a later one is left alone.
        tidy: called in a change of its own, once and whenever the tables have been made.

    Raises:
        CacheFileError: here and from all methods, where the file or its folder cannot be used.
    """

    def __init__(
        self, path: Path, tables: Sequence[str], version: int, tidy: Callable[[sqlite3.Connection], None]
    ) -> None:
        self._path = path
        self._tables = tables
        self._version = version
        self._tidy = tidy
        self._idle: list[_Connection] = []
        self._is_checked = False
        self._is_closed = False
        with self.reading():
            pass

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile; after an exception it is not used again."""
        try:
            connection = self._take()
            try:
                yield connection.raw
            except BaseException:
                connection.raw.close()
                raise
            self._give_back(connection)
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
            if _is_damage(error):
                self._is_checked = False
            reason = error.strerror if isinstance(error, OSError) else None
            raise CacheFileError(self._path.parent, reason or str(error)) from error

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """The same in a transaction, which no other's change comes between. An exception undoes it."""
        with self.reading() as connection, _transaction(connection):
            yield connection

    def close(self) -> None:
        """Close all connections. A second close does nothing."""
        self._is_closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().raw.close()

    def _take(self) -> _Connection:
        """An idle connection to the file that is there now, or a new one."""
        with suppress(FileNotFoundError, IndexError):
            inode = self._path.stat().st_ino
            while True:
                connection = self._idle.pop()
                if self._is_checked and connection.inode == inode:
                    return connection
                connection.raw.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Alone, lest a process that has seen damage sets aside what another has begun instead.
        with _alone(self._path.parent):
            try:
                return self._open()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _is_damage(error):
                    raise
                self._set_aside()
                return self._open()

    def _give_back(self, connection: _Connection) -> None:
        if self._is_closed:
            connection.raw.close()
        else:
            self._idle.append(connection)

    def _open(self) -> _Connection:
        raw = sqlite3.connect(self._path, _PATIENCE, isolation_level=None, check_same_thread=False)
        # Damaged text is for the reader to refuse, not for the connection.
        raw.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            self._prepare(raw)
        except BaseException:
            raw.close()
            raise
        return _Connection(raw, self._path.stat().st_ino)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        [(version,)] = connection.execute("PRAGMA user_version")
        if version > self._version:
            reason = f"made by a later release: version {version}, not {self._version}"
            raise CacheFileError(self._path, reason)
        connection.execute("PRAGMA journal_mode = WAL")
        # Without a sync for each change: a power cut may take back the last ones, but does no damage.
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            with _transaction(connection):
                for statement in (*self._tables, f"PRAGMA user_version = {self._version}"):
                    connection.execute(statement)
        elif self._is_checked:
            return
        [(verdict,), *_] = connection.execute("PRAGMA quick_check")
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        with _transaction(connection):
            self._tidy(connection)
        self._is_checked = True

    def _set_aside(self) -> None:
        # The journal first, as a new file must not meet it.
        for ending in ("-wal", "-shm"):
            self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes and threads out of their own such block for the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_damage(error: BaseException) -> bool:
    """Whether the file's bytes are not what they should be; all else comes as a subclass.

    Damage can be such that SQLite's message about it is no text.
    """
    return type(error) in {sqlite3.DatabaseError, UnicodeDecodeError}
