"""What a file was computed for, written so that all processes write it alike.

A database that several threads and processes use at once, and that is begun anew where it is damaged.

Which files a folder holds, for what, and how lately each was used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import index
from pathlib import Path
from struct import pack, unpack
from typing import NamedTuple

from ..errors import CacheFileError
from . import atomic


class Key(NamedTuple):
    """What tells files apart: a namespace, a salt as text, and packed tokens."""

    namespace: str
    salt: str
    tokens: bytes

    @property
    def digest(self) -> str:
        label = ascii((self.namespace, self.salt)).encode()
        return hashlib.sha256(label + self.tokens).hexdigest()


def packed(tokens: Iterable[int]) -> bytes:
    """Tokens as little-endian numbers of 8 bytes. Raises ValueError for negative or larger ones."""
    numbers = [index(token) for token in tokens]
    if min(numbers, default=0) < 0 or max(numbers, default=0) >= 2**63:
        raise ValueError("tokens must be 0 or more and below 2**63")
    return pack(f"<{len(numbers)}q", *numbers)


def unpacked(tokens: bytes) -> tuple[int, ...]:
    """The tokens again."""
    return unpack(f"<{len(tokens) // 8}q", tokens)


def salt_text(salt: Hashable) -> str | None:
    """A salt as text, different for different ones, or None where there is none to rely on.

    None, bool, int, float, str, bytes and tuples of them have a text. Unlike in a dict, 1, 1.0
    and True are three. Subclasses have none, as they may look like anything.
    """
    return ascii(salt) if _is_plain(salt) else None


def _is_plain(salt: Hashable) -> bool:
    if type(salt) is tuple:
        return all(map(_is_plain, salt))
    return salt is None or type(salt) in {bool, int, float, str, bytes}


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


VERSION = 1
"""Of the tables."""

# So narrow that a file which a user keeps in the folder is never taken for one of ours.
_NAME = re.compile(r"[0-9a-f]{32}\.kvcache")

TOO_LARGE = "larger than the budget"
REPLACED = "the index was replaced meanwhile"
"""Why a file that has been written is not entered."""

_MOST = 2**53
"""Of bytes and uses: sums of such do not overflow."""

_TABLES = (
    """CREATE TABLE entries (
        name TEXT PRIMARY KEY,
        digest TEXT NOT NULL UNIQUE,
        namespace TEXT NOT NULL,
        salt TEXT NOT NULL,
        nbytes INTEGER NOT NULL DEFAULT 0,
        used INTEGER NOT NULL DEFAULT 0,
        is_ready INTEGER NOT NULL DEFAULT 0,
        tokens BLOB NOT NULL
    )""",
    "CREATE INDEX by_use ON entries (used)",
    # A new number whenever other entries can be found than before. It is random, so that
    # an index that takes another's place has never the same.
    "CREATE TABLE state (stamp INTEGER NOT NULL)",
    "INSERT INTO state VALUES (random())",
    """CREATE TRIGGER finished AFTER UPDATE OF is_ready ON entries
        BEGIN UPDATE state SET stamp = random(); END""",
    """CREATE TRIGGER removed AFTER DELETE ON entries
        BEGIN UPDATE state SET stamp = random(); END""",
)


def new_name() -> str:
    """A file's name, never given before: what was found under a name is that or gone."""
    return f"{secrets.token_hex(16)}.kvcache"


class Index:
    """The entries of a folder, and the removal of their files.

    An entry is begun before its file is written and finished afterwards, and it goes after its
    file; so no file is ever there without an entry, whatever ends the process. Safe in threads.

    Args:
        folder: made where it is missing.
        max_bytes: of all files whose entries are finished.

    Raises:
        CacheFileError: here and from all methods, where the folder or the index cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._database = Database(folder / "index.sqlite", _TABLES, VERSION, self._tidy)

    @property
    def nbytes(self) -> int:
        """Bytes of all files whose entries are finished, whatever their namespace."""
        with self._database.reading() as connection:
            return _total(connection)

    @property
    def stamp(self) -> int:
        """The same number while the same entries can be found."""
        with self._database.reading() as connection:
            [(stamp,)] = connection.execute("SELECT stamp FROM state")
            return int(stamp)

    def salts(self, namespace: str) -> dict[str, str]:
        """The names of a namespace's finished entries, with their salts."""
        question = "SELECT name, salt FROM entries WHERE namespace = ? AND is_ready"
        with self._database.reading() as connection:
            return dict(connection.execute(question, (namespace,)))

    def tokens(self, name: str) -> tuple[int, ...] | None:
        """An entry's tokens, or None where it is gone."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT tokens FROM entries WHERE name = ?", (name,)).fetchone()
            return unpacked(row[0]) if row else None

    def find(self, key: Key) -> str | None:
        """The name of the finished entry for just this key."""
        question = "SELECT name FROM entries WHERE digest = ? AND is_ready"
        with self._database.reading() as connection:
            row = connection.execute(question, (key.digest,)).fetchone()
            return row[0] if row else None

    def begin(self, name: str, key: Key) -> bool:
        """Enter a file that is going to be written, and that the caller has claimed.

        Returns:
            False where there is one for the same key, or a living process is writing one.
        """
        question = "SELECT name, is_ready FROM entries WHERE digest = ?"
        with self._database.changing() as connection:
            for other, is_ready in connection.execute(question, (key.digest,)).fetchall():
                if is_ready:
                    _use(connection, other)
                if is_ready or atomic.is_claimed(self._folder / other):
                    return False
                self._remove(connection, other)
            connection.execute(
                "INSERT INTO entries (name, digest, namespace, salt, tokens) VALUES (?, ?, ?, ?, ?)",
                (name, key.digest, *key),
            )
            return True

    def finish(self, name: str, nbytes: int) -> int:
        """Let a file be found that has been written, and remove others that are too much now.

        Returns:
            How many were removed.

        Raises:
            CacheFileError: it is too large by itself, or its entry is gone.
        """
        if nbytes > self._max_bytes:
            raise CacheFileError(self._folder / name, TOO_LARGE)
        with self._database.changing() as connection:
            cursor = connection.execute(
                "UPDATE entries SET is_ready = 1, nbytes = ? WHERE name = ?", (nbytes, name)
            )
            if not cursor.rowcount:
                raise CacheFileError(self._folder / name, REPLACED)
            _use(connection, name)
            return self._shrink(connection)

    def use(self, name: str) -> None:
        """Note that a file was used just now, if it is still there."""
        with self._database.changing() as connection:
            _use(connection, name)

    def remove(self, name: str) -> None:
        """Remove a file and its entry, as far as they are there."""
        with self._database.changing() as connection:
            self._remove(connection, name)

    def close(self) -> None:
        """Close all connections. A second close does nothing."""
        self._database.close()

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Remove what ended processes left, entries without files, and files without entries.

        A file is entered before any of it is written, and others cannot enter any during this
        transaction. So a file without an entry is nobody's, such as after a power cut.
        """
        atomic.sweep(self._folder)
        _mend(connection)
        files = {path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name)}
        entries = dict(connection.execute("SELECT name, is_ready FROM entries"))
        for name, is_ready in entries.items():
            is_whole = name in files if is_ready else atomic.is_claimed(self._folder / name)
            if not is_whole:
                self._remove(connection, name)
        for name in files - entries.keys():
            (self._folder / name).unlink(missing_ok=True)
        self._shrink(connection)

    def _shrink(self, connection: sqlite3.Connection) -> int:
        """Remove the least recently used until the budget holds, and say how many they were."""
        total, removed = _total(connection), 0
        oldest = "SELECT name, nbytes FROM entries WHERE is_ready ORDER BY used LIMIT 1"
        while total > self._max_bytes:
            [(name, nbytes)] = connection.execute(oldest)
            self._remove(connection, name)
            total, removed = total - nbytes, removed + 1
        return removed

    def _remove(self, connection: sqlite3.Connection, name: str) -> None:
        """The file first: an entry without a file is found out by its reader, a stray file by nobody."""
        # Whatever an index tells, nothing else is removed.
        if _NAME.fullmatch(name):
            (self._folder / name).unlink(missing_ok=True)
        connection.execute("DELETE FROM entries WHERE name = ?", (name,))


def _mend(connection: sqlite3.Connection) -> None:
    """Forget entries that are not as they were entered: SQLite has no checksums, and names become paths."""
    columns = "rowid, name, digest, namespace, salt, tokens, nbytes, used, is_ready"
    for row, *entry in connection.execute(f"SELECT {columns} FROM entries").fetchall():  # noqa: S608
        if not _is_sound(*entry):
            connection.execute("DELETE FROM entries WHERE rowid = ?", (row,))
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (random())")


def _is_sound(
    name: object, digest: object, namespace: object, salt: object, tokens: object, *numbers: object
) -> bool:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    if not (isinstance(namespace, str) and isinstance(salt, str) and isinstance(tokens, bytes)):
        return False
    are_counts = all(isinstance(number, int) and 0 <= number < _MOST for number in numbers)
    return are_counts and Key(namespace, salt, tokens).digest == digest


def _use(connection: sqlite3.Connection, name: str) -> None:
    """Numbers rather than times, as clocks of several processes may differ or be set back."""
    connection.execute(
        "UPDATE entries SET used = (SELECT max(used) + 1 FROM entries) WHERE name = ?", (name,)
    )


def _total(connection: sqlite3.Connection) -> int:
    [(total,)] = connection.execute("SELECT coalesce(sum(nbytes), 0) FROM entries WHERE is_ready")
    return int(total)
