"""A folder of files by the tokens that they were computed for, shared by processes and kept over restarts."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..arguments import whole
from ..errors import CacheError, CacheFileError
from ..prefixes import PrefixTree
from . import atomic
from .background import Background
from .index import REPLACED, TOO_LARGE, Index, new_name
from .keys import Key, packed, salt_text


class Found(NamedTuple):
    """A file, and the tokens that it was written for."""

    tokens: tuple[int, ...]
    path: Path


class PrefixFolder:
    """Files that are found again by the tokens' beginnings, the least recently used removed.

    What is in a file is the caller's business. A thread writes the files one after another. All
    methods may be called from any thread, and several processes may use a folder at once; what
    one of them has written the others find. The file system must be a local one.

    Args:
        folder: made where it is missing.
        max_bytes: of all files that can be found, those of other namespaces included. Where
            processes give different bounds, each holds to its own when it has written.
        namespace: tells apart what must never be found by others, such as a digest of the
            model and the options; they share the folder and its bound.
        max_pending: the most bytes that wait to be written. A single file may be larger.

    Attributes:
        counts: what has happened, by name: "written", "evicted", "discarded"; why a file was
            not taken: "already there", "larger than the budget", "behind", "salt cannot be
            written"; and "failed: " with the kind of error, for what went wrong on the thread.
        last_failure: the message of the newest of these errors.

    Raises:
        ValueError: a negative bound.
        CacheFileError: the folder or its index cannot be used.
    """

    def __init__(
        self, folder: Path | str, max_bytes: int, namespace: str, max_pending: int = 256 * 2**20
    ) -> None:
        max_bytes, max_pending = whole(max_bytes=max_bytes, max_pending=max_pending)
        self.counts: Counter[str] = Counter()
        self.last_failure = ""
        self._folder = Path(folder).absolute()
        self._max_bytes = max_bytes
        self._namespace = namespace
        self._max_pending = max_pending
        self._index = Index(self._folder, max_bytes)
        self._background = Background(self._index.close)
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._is_closed = False

        self._pending: dict[Key, int] = {}
        self._trees: dict[str, PrefixTree[Found]] = {}
        self._known: dict[str, tuple[str, Found]] = {}
        self._stamp: int | None = None

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    @property
    def nbytes(self) -> int:
        """Bytes of all files that can be found, those of other namespaces and processes included.

        Raises:
            CacheFileError: the index cannot be read.
        """
        self._check_open()
        return self._index.nbytes

    def put(self, tokens: Sequence[int], salt: Hashable, write: Callable[[Path], int], nbytes: int) -> bool:
        """Have a file written, later and on another thread.

        Args:
            tokens: what it is for.
            salt: keeps apart what must not be shared. It can be None, a bool, int, float, str or
                bytes, or a tuple of such; unlike in a dict, 1, 1.0 and True are three.
            write: makes the file at a path and returns its bytes; it is there whole or not at
                all, and an exception is counted.
            nbytes: how many they will be, about.

        Returns:
            Whether it will be written; `counts` says why not. One that is there for the same
            tokens counts as used.

        Raises:
            ValueError: no tokens, or negative ones.
            CacheError: it is closed.
            CacheFileError: the index cannot be read.
        """
        if not len(tokens):
            raise ValueError("a file is for at least 1 token")
        text, blob = salt_text(salt), packed(tokens)
        with self._lock:
            self._check_open()
            if text is None:
                return self._refuse("salt cannot be written")
            if nbytes > self._max_bytes:
                return self._refuse("larger than the budget")
            key = Key(self._namespace, text, blob)
            if self._is_there(key):
                return self._refuse("already there")
            if self._pending and sum(self._pending.values()) + nbytes > self._max_pending:
                return self._refuse("behind")
            self._pending[key] = nbytes
            self._later(partial(self._write, key, write))
            return True

    def has(self, tokens: Sequence[int], salt: Hashable) -> bool:
        """Whether there is a file for just these tokens, or will be; that counts as a use.

        Raises:
            CacheError: it is closed.
            CacheFileError: the index cannot be read.
        """
        text = salt_text(salt)
        with self._lock:
            self._check_open()
            if text is None:
                return False
            return self._is_there(Key(self._namespace, text, packed(tokens)))

    def matches(self, tokens: Sequence[int], salt: Hashable) -> Iterator[tuple[int, Found]]:
        """Files with the number of first tokens that they share, the longest first, as in a `PrefixTree`.

        A file may be gone by the time that it is opened: `discard` it, and take it for a miss.

        Raises:
            CacheError: it is closed.
            CacheFileError: the index cannot be read.
        """
        text = salt_text(salt)
        with self._lock:
            self._check_open()
            self._refresh()
            tree = self._trees.get(text) if text is not None else None
            return iter(list(tree.matches(tokens)) if tree else [])

    def touch(self, found: Found) -> None:
        """Note that a file was used just now. Raises CacheError where it is closed."""
        with self._lock:
            self._check_open()
            self._later(partial(self._use, found.path.name))

    def discard(self, found: Found) -> None:
        """Forget a file that is damaged or gone, and remove what there is of it.

        Raises:
            CacheError: it is closed.
            CacheFileError: the file cannot be removed, or the index not be written.
        """
        self._check_open()
        self._index.remove(found.path.name)
        with self._lock:
            self.counts["discarded"] += 1

    def flush(self) -> None:
        """Wait until what was put has been written or has failed. Raises CacheError where it is closed."""
        done = threading.Event()
        with self._lock:
            self._check_open()
            self._background.add(done.set)
        done.wait()

    def close(self) -> None:
        """Write what was put, and stop. A second close does nothing.

        Without it the end of the process does the same.
        """
        with self._lock:
            self._is_closed = True
        self._background.close()

    def __enter__(self) -> PrefixFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed or not self._background.is_open:
            raise CacheError(f"{self._folder}: it is closed")
        if self._process != os.getpid():
            # Threads do not come along, and connections must not.
            raise CacheError(f"{self._folder}: opened before a fork; each process opens its own")

    def _is_there(self, key: Key) -> bool:
        """Whether there is a file for a key, or will be; that counts as a use."""
        name = None if key in self._pending else self._index.find(key)
        if name:
            self._later(partial(self._use, name))
        return key in self._pending or name is not None

    def _refuse(self, reason: str) -> bool:
        self.counts[reason] += 1
        return False

    def _later(self, work: Callable[[], Counter[str]]) -> None:
        self._background.add(partial(self._count, work))

    def _count(self, work: Callable[[], Counter[str]]) -> None:
        """Do something on the thread, and count what came of it."""
        try:
            happened = work()
        except BaseException as error:  # noqa: BLE001  # the thread must go on with what others put
            happened = Counter([f"failed: {_kind(error)}"])
            self.last_failure = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts += happened

    def _write(self, key: Key, write: Callable[[Path], int]) -> Counter[str]:
        path = self._folder / new_name()
        try:
            with atomic.claiming(path):
                if not self._index.begin(path.name, key):
                    return Counter(["already there"])
                try:
                    return Counter(evicted=self._index.finish(path.name, write(path)), written=1)
                except BaseException:
                    # Should this fail too, the next start takes it for an ended process's.
                    with suppress(CacheFileError):
                        self._index.remove(path.name)
                    raise
        finally:
            with self._lock:
                del self._pending[key]

    def _use(self, name: str) -> Counter[str]:
        self._index.use(name)
        return Counter()

    def _refresh(self) -> None:
        """Bring the trees up to date with what this and other processes have written and removed."""
        stamp = self._index.stamp
        if stamp == self._stamp:
            return
        salts = self._index.salts(self._namespace)
        for name in self._known.keys() - salts.keys():
            salt, found = self._known.pop(name)
            tree = self._trees[salt]
            tree.pop(found.tokens)
            if not tree:
                del self._trees[salt]
        for name in salts.keys() - self._known.keys():
            tokens = self._index.tokens(name)
            if tokens is not None:
                found = Found(tokens, self._folder / name)
                self._known[name] = salts[name], found
                self._trees.setdefault(salts[name], PrefixTree()).put(tokens, found)
        self._stamp = stamp


def _kind(error: BaseException) -> str:
    """One of a few texts: messages name files and sizes, and a count for each would be one for each file."""
    cause = error.__cause__ if isinstance(error, CacheFileError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    if isinstance(error, CacheFileError) and error.reason in (TOO_LARGE, REPLACED):
        return error.reason
    return type(cause or error).__name__
