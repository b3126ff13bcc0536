"""A thread for what nobody waits for, which loses nothing when the process ends.

A folder of files by the tokens that they were computed for, shared by processes and kept over restarts.

A second place for caches that have to leave memory: a folder of files.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from ..arguments import whole
from ..errors import CacheError, CacheFileError, CacheFullError
from ..radix_tree import PrefixTree
from . import atomic
from .files import Prepared
from .index import REPLACED, TOO_LARGE, Index, Key, new_name, packed, salt_text

Work = Callable[[], None]


class Background:
    """A thread that does one thing after another.

    Args:
        finish: called at the end, after all else.
    """

    def __init__(self, finish: Work) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._queue,), name="mlx_kvcache", daemon=True)
        thread.start()
        # Runs at `close`, when this object is dropped, or at the end of the process. What waits
        # holds whoever gave it, so behind a dropped one nothing waits, and dropping is quick.
        self._end = weakref.finalize(self, _end, self._queue, thread, finish)

    @property
    def is_open(self) -> bool:
        return self._end.alive

    def add(self, work: Work) -> None:
        """Have something done that raises nothing. What is added behind a close is not done."""
        self._queue.put(work)

    def close(self) -> None:
        """Wait for all that was added, and end. A second close does nothing."""
        self._end()


def _work(queue: SimpleQueue[Work | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # It may hold arrays, which must not live on until there is something to do again.
        del work


def _end(queue: SimpleQueue[Work | None], thread: threading.Thread, finish: Work) -> None:
    queue.put(None)
    # The thread itself may be the one that drops the last reference.
    if thread is not threading.current_thread():
        thread.join()
    finish()


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


CANDIDATES = 8
"""Files that are opened to ask how far they can go back, at most."""


class Load(Protocol):
    """Makes a cache of a file. Without `verify` only what it holds is read."""

    def __call__(self, path: Path, verify: bool) -> Any: ...


class Kept(NamedTuple):
    """A cache that was in a file, the tokens in it, and how many first ones it can go on from."""

    tokens: tuple[int, ...]
    cache: Any
    point: int


class DiskTier:
    """Caches of one model in a `PrefixFolder`.

    All work with MLX is done by whoever calls; the folder's thread writes bytes only.

    Args:
        folder: where; its namespace must tell the model from others.
        prepare: copies what is to be written of a cache, for these tokens.
        load: makes a cache of a file.
    """

    def __init__(
        self, folder: PrefixFolder, prepare: Callable[[Any, Sequence[int]], Prepared], load: Load
    ) -> None:
        self.folder = folder
        self._prepare = prepare
        self._load = load

    def put(self, tokens: Sequence[int], salt: Hashable, cache: Any) -> bool:
        """Have a cache written. Returns whether it will be; it may be closed in any case.

        Raises:
            CacheFileError: the folder cannot be used.
        """
        if self.folder.has(tokens, salt):
            return False
        prepared = self._prepare(cache, tokens)
        return self.folder.put(tokens, salt, prepared.write, prepared.nbytes)

    def nearest(self, tokens: Sequence[int], salt: Hashable, more_than: int) -> Kept | None:
        """The cache that saves most of these tokens, if it is more than so many; one is left to compute.

        Raises:
            CacheFileError: the folder cannot be used.
        """
        best: tuple[int, Found | None] = (more_than, None)
        for common, found in islice(self.folder.matches(tokens, salt), CANDIDATES):
            most = min(common, len(tokens) - 1)
            if most <= best[0]:
                break
            # Nothing of its arrays is read for that.
            cache = self._loaded(found, verify=False)
            if cache is not None:
                point = cache.resume_point(most)
                cache.close()
                best = max(best, (point, found), key=lambda pair: pair[0])
        point, chosen = best
        if chosen is None:
            return None
        cache = self._loaded(chosen, verify=True)
        if cache is None:
            # It was damaged; what remains may do.
            return self.nearest(tokens, salt, more_than)
        self.folder.touch(chosen)
        return Kept(chosen.tokens, cache, point)

    def close(self) -> None:
        """Write what is waiting, and let go of the folder."""
        self.folder.close()

    def _loaded(self, found: Found, verify: bool) -> Any:
        """The cache of a file, or None where it is too long, damaged or gone; the last two are forgotten."""
        try:
            return self._load(found.path, verify)
        except CacheFullError:
            # It is longer than these caches may be; a shorter one may do.
            return None
        except CacheFileError:
            self.folder.discard(found)
            return None
