"""The SQLite index of a folder of cache files: each file's tokens, size and last use.

`Index` adds, finds and evicts files. `Key` identifies a file by namespace, salt and tokens, in the same
bytes in every process. `PackedPrefixes` finds those that share a prefix with given tokens. `Database` lets
several threads and processes use one SQLite file, and replaces a corrupt file with an empty one.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import secrets
import sqlite3
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from struct import unpack
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import CacheFileError
from ..radix_tree import shared_length
from . import atomic

V = TypeVar("V")


class Key(NamedTuple):
    """The key of a file: a namespace, a salt as text, and packed tokens."""

    namespace: str
    salt: str
    tokens: bytes

    @property
    def digest(self) -> str:
        label = ascii((self.namespace, self.salt)).encode()
        return hashlib.sha256(label + self.tokens).hexdigest()


_TOKEN = 8
"""The bytes of a packed token."""


def packed(tokens: Iterable[int]) -> bytes:
    """Return tokens as little-endian integers of 8 bytes. Raises ValueError if one is out of range."""
    try:
        numbers = array("q", iter(tokens))
    except OverflowError:
        numbers = array("q", [-1])
    if min(numbers, default=0) < 0:
        raise ValueError("tokens must be at least 0 and less than 2**63")
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def packed_start(tokens: Sequence[int]) -> bytes:
    """Return the tokens before the first one that is out of range, packed."""
    try:
        return packed(tokens)
    except ValueError:
        return packed(takewhile(lambda token: 0 <= token < 2**63, tokens))


def unpacked(blob: bytes) -> tuple[int, ...]:
    """Return the tokens that `packed` packed."""
    return unpack(f"<{len(blob) // _TOKEN}q", blob)


def salt_text(salt: Hashable) -> str | None:
    """Return a salt as unambiguous text, or None if its type is not supported.

    Supported are None, bool, int, float, str, bytes and tuples of them. Unlike in a dict, 1, 1.0 and True
    are different. Subclasses are not supported, since their repr may be anything.
    """
    return ascii(salt) if _is_plain(salt) else None


def _is_plain(salt: Hashable) -> bool:
    if type(salt) is tuple:
        return all(map(_is_plain, salt))
    return salt is None or type(salt) in {bool, int, float, str, bytes}


class PackedPrefixes(Generic[V]):
    """A mapping from packed token sequences, which are not empty, to values; it also finds shared prefixes.

    A folder may list millions of tokens, so they stay packed, and sorted: the sequences that share the
    longest prefix with given tokens are neighbors of the place where these would be.
    """

    def __init__(self) -> None:
        self._sorted: list[bytes] = []
        self._values: list[V] = []

    def __bool__(self) -> bool:
        """Whether there is a value."""
        return bool(self._sorted)

    def put(self, tokens: bytes, value: V) -> None:
        """Store the value of tokens that have none."""
        at = bisect_left(self._sorted, tokens)
        self._sorted.insert(at, tokens)
        self._values.insert(at, value)

    def pop(self, tokens: bytes) -> None:
        """Remove the value of tokens that have one."""
        at = bisect_left(self._sorted, tokens)
        del self._sorted[at], self._values[at]

    def matches(self, tokens: bytes) -> Iterator[tuple[int, V]]:
        """As `PrefixTree.matches`: yield (length of the shared prefix, value), the longest prefix first."""
        at = bisect_left(self._sorted, tokens)
        prefix = max(self._shared(at - 1, tokens), self._shared(at, tokens), key=len)
        if not prefix:
            return
        at = bisect_left(self._sorted, prefix)
        end = bisect_right(self._sorted, prefix, at, key=lambda own: own[: len(prefix)])
        for value in self._values[at:end]:
            yield len(prefix) // _TOKEN, value
        # Sequences that are themselves a prefix come before all others that begin with it.
        while shorter := self._shared(at - 1, tokens):
            at = bisect_left(self._sorted, shorter)
            if self._sorted[at] == shorter:
                yield len(shorter) // _TOKEN, self._values[at]

    def _shared(self, at: int, tokens: bytes) -> bytes:
        """Return the prefix that tokens share with the sequence at a place; none if no sequence is there."""
        if not 0 <= at < len(self._sorted):
            return b""
        common = shared_length(self._sorted[at], tokens)
        return tokens[: common - common % _TOKEN]


VERSION = 1
"""The version of the tables."""

# Only files with such a name are removed, so a user's own files in the folder are safe.
_NAME = re.compile(r"[0-9a-f]{32}\.kvcache")

TOO_LARGE = "larger than the budget"
REPLACED = "the index was replaced meanwhile"
"""Reasons why a written file is not added to the index."""

_AT_ONCE = 100
"""The most entries that are read at once."""

_MOST = 2**53
"""The limit for sizes and use counters, so that their sums do not overflow."""

_TOTAL = "SELECT coalesce(sum(nbytes), 0) FROM entries WHERE is_ready"

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
    # The stamp changes whenever the set of ready entries changes. It is random, so that a new index
    # never has the stamp of the one that it replaces.
    "CREATE TABLE state (stamp INTEGER NOT NULL)",
    "INSERT INTO state VALUES (random())",
    """CREATE TRIGGER finished AFTER UPDATE OF is_ready ON entries
        BEGIN UPDATE state SET stamp = random(); END""",
    """CREATE TRIGGER removed AFTER DELETE ON entries
        BEGIN UPDATE state SET stamp = random(); END""",
)

_TIMEOUT = 30.0
"""Seconds to wait for another process's transaction, which takes milliseconds."""


class _Connection(sqlite3.Connection):
    """A connection that knows which file it has opened."""

    inode = 0


class Database:
    """A pool of connections to one SQLite file, each used by one thread at a time.

    A corrupt file is renamed to end in `.damaged`, and a new one is created. All methods raise
    CacheFileError, which names the folder, if the file or its folder cannot be used.

    Args:
        path: the file. Its folder is created if it is missing. A file of a newer version is refused and
            left unchanged.
        tidy: cleans up, in a transaction of its own, when the file is first opened or was created anew.
    """

    def __init__(self, path: Path, tidy: Callable[[sqlite3.Connection], None]) -> None:
        self._path = path
        self._tidy = tidy
        self._idle: list[_Connection] = []
        self._is_checked = False
        self._is_closed = False
        with self.reading():
            pass

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for exclusive use. After an exception, the connection is closed."""
        try:
            connection = self._take()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if self._is_closed:
                connection.close()
            else:
                self._idle.append(connection)
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
            if _is_damage(error):
                self._is_checked = False
            reason = error.strerror if isinstance(error, OSError) else None
            raise CacheFileError(self._path.parent, reason or str(error)) from error

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection inside a write transaction. An exception rolls it back."""
        with self.reading() as connection, _transaction(connection):
            yield connection

    def close(self) -> None:
        """Close all connections. Closing again does nothing."""
        self._is_closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _take(self) -> _Connection:
        """Return an idle connection to the current file, or a new one."""
        with suppress(FileNotFoundError, IndexError):
            inode = self._path.stat().st_ino
            while True:
                connection = self._idle.pop()
                if self._is_checked and connection.inode == inode:
                    return connection
                connection.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.opened_folder(self._path.parent) as folder:
            # The lock keeps a process from setting aside the new file of another that saw the same
            # corruption.
            fcntl.flock(folder, fcntl.LOCK_EX)
            try:
                return self._open()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _is_damage(error):
                    raise
                # Remove the journal first: SQLite would apply it to the new file.
                for ending in ("-wal", "-shm"):
                    self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
                self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
                return self._open()

    def _open(self) -> _Connection:
        connection = sqlite3.connect(
            self._path, _TIMEOUT, isolation_level=None, check_same_thread=False, factory=_Connection
        )
        # Invalid text must not raise here: `_mend` removes its row.
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            self._prepare(connection)
            connection.inode = self._path.stat().st_ino
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        [(version,)] = connection.execute("PRAGMA user_version")
        if version > VERSION:
            reason = f"index version {version} is newer than {VERSION}; update mlx_kvcache"
            raise CacheFileError(self._path, reason)
        connection.execute("PRAGMA journal_mode = WAL")
        # No sync for each transaction: a power failure may lose the last ones but does not corrupt the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            with _transaction(connection):
                for statement in (*_TABLES, f"PRAGMA user_version = {VERSION}"):
                    connection.execute(statement)
        elif self._is_checked:
            return
        [(verdict,), *_] = connection.execute("PRAGMA quick_check")
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        with _transaction(connection):
            self._tidy(connection)
        self._is_checked = True


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def _is_damage(error: BaseException) -> bool:
    """Return whether an error means that the file is corrupt.

    SQLite reports corruption as DatabaseError itself, and other errors as subclasses. Its message about a
    corrupt file may not be valid UTF-8.
    """
    return type(error) in {sqlite3.DatabaseError, UnicodeDecodeError}


def new_name() -> str:
    """Return a random name for a file. Names are never reused."""
    return f"{secrets.token_hex(16)}.kvcache"


class Index:
    """The index of a folder. It also removes files.

    An entry is added before its file is written, becomes ready afterwards, and is removed after its file.
    So every file has an entry, even if the process is killed. Thread-safe. All methods raise CacheFileError
    if the folder or the index cannot be used.

    Args:
        folder: created if it is missing.
        max_bytes: the limit for the files of all ready entries.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._database = Database(folder / "index.sqlite", self._tidy)

    @property
    def nbytes(self) -> int:
        """The size of the files of all ready entries in bytes, in all namespaces."""
        [(total,)] = self._rows(_TOTAL)
        return int(total)

    @property
    def stamp(self) -> int:
        """A random number that changes whenever the set of ready entries changes."""
        [(stamp,)] = self._rows("SELECT stamp FROM state")
        return int(stamp)

    def salts(self, namespace: str) -> dict[str, str]:
        """Return the salts of a namespace's ready entries by file name."""
        return dict(self._rows("SELECT name, salt FROM entries WHERE namespace = ? AND is_ready", namespace))

    def tokens(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the names and packed tokens of entries. Leaves out those that were removed."""
        left = iter(names)
        while some := list(islice(left, _AT_ONCE)):
            marks = ", ".join("?" * len(some))
            yield from self._rows(f"SELECT name, tokens FROM entries WHERE name IN ({marks})", *some)  # noqa: S608

    def find(self, key: Key) -> str | None:
        """Return the file name of the ready entry for this key, or None."""
        rows = self._rows("SELECT name FROM entries WHERE digest = ? AND is_ready", key.digest)
        return rows[0][0] if rows else None

    def begin(self, name: str, key: Key) -> bool:
        """Add an entry for a file that will be written. The caller must hold `atomic.claiming` on it.

        Returns False if a file for the same key exists, or a running process is writing one.
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
        """Mark a written file as ready, evict others until the limit holds, and return how many.

        Raises:
            CacheFileError: the file alone exceeds the limit, or its entry was removed.
        """
        if nbytes > self._max_bytes:
            raise CacheFileError(self._folder / name, TOO_LARGE)
        finished = "UPDATE entries SET is_ready = 1, nbytes = ? WHERE name = ?"
        with self._database.changing() as connection:
            if not connection.execute(finished, (nbytes, name)).rowcount:
                raise CacheFileError(self._folder / name, REPLACED)
            _use(connection, name)
            return self._shrink(connection)

    def use(self, names: Iterable[str]) -> None:
        """Mark files as used, one after the other. Does nothing for those whose entries were removed."""
        with self._database.changing() as connection:
            for name in names:
                _use(connection, name)

    def remove(self, name: str) -> None:
        """Remove a file and its entry, if they exist."""
        with self._database.changing() as connection:
            self._remove(connection, name)

    def close(self) -> None:
        """Close the index. Closing again does nothing."""
        self._database.close()

    def _rows(self, question: str, *values: str) -> list[Any]:
        with self._database.reading() as connection:
            return connection.execute(question, values).fetchall()

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Remove leftovers of killed processes, entries without files, and files without entries.

        Entries are added before their files are written, and no other process can add one during this
        transaction. So a file without an entry, such as after a power failure, is not in use.
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
        """Evict the least recently used files until the limit holds, and return their number."""
        [(total,)] = connection.execute(_TOTAL)
        removed = 0
        oldest = "SELECT name, nbytes FROM entries WHERE is_ready ORDER BY used LIMIT 1"
        while total > self._max_bytes:
            [(name, nbytes)] = connection.execute(oldest)
            self._remove(connection, name)
            total, removed = total - nbytes, removed + 1
        return removed

    def _remove(self, connection: sqlite3.Connection, name: str) -> None:
        """Remove a file, then its entry: readers detect a missing file, but not a file without an entry."""
        # A corrupt index could name any path.
        if _NAME.fullmatch(name):
            (self._folder / name).unlink(missing_ok=True)
        connection.execute("DELETE FROM entries WHERE name = ?", (name,))


def _mend(connection: sqlite3.Connection) -> None:
    """Remove corrupt entries. SQLite has no checksums, and the names become paths."""
    columns = "rowid, name, digest, namespace, salt, tokens, nbytes, used, is_ready"
    for row, *entry in connection.execute(f"SELECT {columns} FROM entries").fetchall():  # noqa: S608
        if not _is_sound(*entry):
            connection.execute("DELETE FROM entries WHERE rowid = ?", (row,))
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (random())")


def _is_sound(
    name: object, digest: object, namespace: object, salt: object, tokens: object, *numbers: object
) -> bool:
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and all(isinstance(number, int) and 0 <= number < _MOST for number in numbers)
        and isinstance(namespace, str)
        and isinstance(salt, str)
        and isinstance(tokens, bytes)
        and Key(namespace, salt, tokens).digest == digest
    )


def _use(connection: sqlite3.Connection, name: str) -> None:
    """Mark a file as used. A counter orders the uses, since clocks may be set back."""
    connection.execute(
        "UPDATE entries SET used = (SELECT max(used) + 1 FROM entries) WHERE name = ?", (name,)
    )
