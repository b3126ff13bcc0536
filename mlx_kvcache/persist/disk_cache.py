"""A prefix cache on disk: caches that are evicted from memory, found again by their tokens.

`DiskTier` converts caches to files and back. `PrefixFolder` stores the files with an SQLite index, evicts
the least recently used, and finds those that share a prefix with given tokens; several processes may use
a folder, and it outlives them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from ..arguments import whole
from ..errors import CacheError, CacheFileError, CacheFullError
from ..radix_tree import shared_length
from . import atomic
from .files import LONGEST, Base, Prepared, base_of, contents_of
from .index import (
    REPLACED,
    TOO_LARGE,
    Index,
    Key,
    PackedPrefixes,
    new_name,
    packed,
    packed_start,
    salt_text,
    unpacked,
)

Work = Callable[[], object]


class Found(NamedTuple):
    """A file, and the tokens of the sequence in it."""

    tokens: tuple[int, ...]
    path: Path


class _Queued(NamedTuple):
    """A file that waits to be written."""

    tokens: tuple[int, ...]
    path: Path
    nbytes: int
    base: Base | None


SHARED = 256
"""The fewest tokens for which a file relies on another one."""


class PrefixFolder:
    """A folder of files that are found by a prefix of their tokens; the least recently used are evicted.

    A file may rely on another one for its first tokens, its base. Whenever a file is used, its bases are used
    after it, so that eviction reaches a base after all files that rely on it. A file without its base is
    discarded when it is read.

    The caller decides the contents of the files. A thread writes them one at a time, and finishes before the
    process exits. All methods are thread-safe. Several processes may use a folder at once, and each finds
    the files of the others. The folder must be on a local file system.

    All methods raise CacheError if the folder is closed, and CacheFileError if it or its index cannot be
    used.

    Args:
        folder: created if it is missing.
        max_bytes: the limit for all files, those of other namespaces included. If processes give different
            limits, each applies its own after writing a file.
        namespace: separates files that must not be mixed, such as a digest of the model and the options.
        max_pending: the most bytes that may wait to be written. A single file may be larger.

    Attributes:
        counts: the number of events by name: "written", "evicted" and "discarded" files; refused files, by
            reason: "already there", "larger than the budget", "behind" (more than `max_pending` bytes would
            wait), "its base is gone", "salt cannot be written"; and failures of the thread: "failed: " with
            the kind of error.
        last_failure: the message of the newest failure of the thread.

    Raises:
        ValueError: a limit is negative.
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
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._is_closed = False
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._queue,), name="mlx_kvcache", daemon=True)
        thread.start()
        # Runs on `close`, when this object is collected, or at exit. Queued work refers to this object, so
        # collection happens only when the queue is empty and does not block.
        self._end = weakref.finalize(self, _end, self._queue, thread, self._index)

        self._pending: dict[Key, _Queued] = {}
        # By salt: the names of files by their tokens.
        self._names: dict[str, PackedPrefixes[str]] = {}
        self._known: dict[str, tuple[str, bytes]] = {}
        self._stamp: int | None = None

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    @property
    def nbytes(self) -> int:
        """The size of all files in bytes, those of other namespaces and processes included."""
        self._check_open()
        return self._index.nbytes

    def base(self, tokens: Sequence[int], salt: Hashable) -> Base | None:
        """Return the file that holds most of the first tokens of a sequence, if it is worth to rely on it."""
        text = salt_text(salt)
        with self._lock:
            queued = [own for key, own in self._pending.items() if key[:2] == (self._namespace, text)]
        found = [(shared_length(own.tokens, tokens), own.path) for own in queued]
        found += [(common, own.path) for common, own in islice(self.matches(tokens, salt), 1)]
        length, path = max(found, default=(0, None))
        if path is None or length < SHARED:
            return None
        bases = [Base(path.name, length), *self._bases(path)]
        # A file that relies on another one for all of these tokens would only be one more to read.
        bases = bases[next(i for i, own in enumerate([*bases[1:], Base("", 0)]) if own.length < length) :]
        return Base(bases[0].name, length) if len(bases) < LONGEST else None

    def _bases(self, path: Path) -> list[Base]:
        """Return the bases of a file, each the base of the one before. Files that are missing have none."""
        with self._lock:
            queued = {own.path: own.base for own in self._pending.values()}
        found: list[Base] = []
        while len(found) < LONGEST:
            base = queued.get(path)
            if path not in queued:
                try:
                    base = _base_in(path)
                except (CacheFileError, ValueError):
                    base = None
            if base is None:
                break
            found.append(base)
            path = path.with_name(base.name)
        return found

    def put(
        self,
        tokens: Sequence[int],
        salt: Hashable,
        write: Callable[[Path], int],
        nbytes: int,
        base: Base | None = None,
    ) -> bool:
        """Queue a file to be written on the thread. An existing file for the same tokens is marked as used.

        Args:
            tokens: the tokens of the sequence in the file.
            salt: separates sequences that must not be shared; see `salt_text`.
            write: writes the file to a path atomically, and returns its size in bytes.
            nbytes: the approximate size of the file in bytes.
            base: the file that it relies on; see `base`.

        Returns:
            Whether the file will be written. If not, `counts` has the reason.

        Raises:
            ValueError: there are no tokens, or one is outside [0, 2**63).
        """
        if not len(tokens):
            raise ValueError("cannot store a file for 0 tokens: at least 1 token is needed")
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
            if (
                self._pending
                and sum(own.nbytes for own in self._pending.values()) + nbytes > self._max_pending
            ):
                return self._refuse("behind")
            queued = _Queued(tuple(tokens), self._folder / new_name(), nbytes, base)
            self._pending[key] = queued
            self._add(partial(self._write, key, queued, write))
            return True

    def has(self, tokens: Sequence[int], salt: Hashable) -> bool:
        """Return whether a file for exactly these tokens exists or is queued, and mark it as used."""
        text = salt_text(salt)
        with self._lock:
            self._check_open()
            return text is not None and self._is_there(Key(self._namespace, text, packed(tokens)))

    def matches(self, tokens: Sequence[int], salt: Hashable) -> Iterator[tuple[int, Found]]:
        """Yield files with the number of leading tokens that they share, the longest match first.

        Another process may remove a file before it is opened: in that case, call `discard`.
        """
        text = salt_text(salt)
        with self._lock:
            self._check_open()
            self._refresh()
            own = self._names.get(text) if text is not None else None
            found = list(own.matches(packed_start(tokens))) if own else []
            blobs = [self._known[name][1] for _, name in found]
        return (
            (common, Found(unpacked(blob), self._folder / name))
            for (common, name), blob in zip(found, blobs, strict=True)
        )

    def touch(self, found: Found) -> None:
        """Mark a file as used."""
        with self._lock:
            self._check_open()
            self._add(partial(self._use, found.path))

    def _use(self, path: Path, bases: Sequence[Base] | None = None) -> None:
        """Mark a file as used, and its bases after it."""
        bases = self._bases(path) if bases is None else bases
        self._index.use([path.name, *(base.name for base in bases)])

    def discard(self, found: Found) -> None:
        """Remove a corrupt or missing file, and its index entry."""
        self._check_open()
        self._index.remove(found.path.name)
        with self._lock:
            self.counts["discarded"] += 1

    def flush(self) -> None:
        """Wait until all queued files are written or have failed."""
        done = threading.Event()
        with self._lock:
            self._check_open()
            self._queue.put(done.set)
        done.wait()

    def close(self) -> None:
        """Write all queued files, and stop the thread. Closing again does nothing."""
        with self._lock:
            self._is_closed = True
        self._end()

    def __enter__(self) -> PrefixFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed or not self._end.alive:
            raise CacheError(f"{self._folder} is closed")
        if self._process != os.getpid():
            # A fork copies no threads, and SQLite connections must not be used across a fork.
            raise CacheError(f"{self._folder} was opened before a fork; open it again in this process")

    def _is_there(self, key: Key) -> bool:
        name = None if key in self._pending else self._index.find(key)
        if name:
            self._add(partial(self._use, self._folder / name))
        return key in self._pending or name is not None

    def _refuse(self, reason: str) -> bool:
        self.counts[reason] += 1
        return False

    def _add(self, work: Callable[[], Counter[str] | None]) -> None:
        """Queue work for the thread, which adds the returned events to `counts`."""
        self._queue.put(partial(self._run, work))

    def _run(self, work: Callable[[], Counter[str] | None]) -> None:
        try:
            happened = work() or Counter[str]()
        except BaseException as error:  # noqa: BLE001  # the thread must go on with the rest of the queue
            happened = Counter([f"failed: {_kind(error)}"])
            self.last_failure = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts += happened

    def _write(self, key: Key, queued: _Queued, write: Callable[[Path], int]) -> Counter[str]:
        path, bases = queued.path, self._bases(queued.path)
        try:
            with atomic.claiming(path):
                if not self._index.begin(path.name, key):
                    return Counter(["already there"])
                try:
                    # Before others are evicted to make room.
                    self._use(path, bases)
                    evicted = self._index.finish(path.name, write(path))
                    self._use(path, bases)
                    if any(not path.with_name(base.name).exists() for base in bases):
                        self._index.remove(path.name)
                        return Counter({"evicted": evicted, "its base is gone": 1})
                    return Counter(evicted=evicted, written=1)
                except BaseException:
                    # If this fails too, the next process to open the folder removes the entry.
                    with suppress(CacheFileError):
                        self._index.remove(path.name)
                    raise
        finally:
            with self._lock:
                del self._pending[key]

    def _refresh(self) -> None:
        """Update the trees with the files that this and other processes have written and removed."""
        stamp = self._index.stamp
        if stamp == self._stamp:
            return
        salts = self._index.salts(self._namespace)
        for name in self._known.keys() - salts.keys():
            salt, blob = self._known.pop(name)
            self._names[salt].pop(blob)
            if not self._names[salt]:
                del self._names[salt]
        for name, blob in self._index.tokens(salts.keys() - self._known.keys()):
            self._known[name] = salts[name], blob
            self._names.setdefault(salts[name], PackedPrefixes()).put(blob, name)
        self._stamp = stamp


@lru_cache(maxsize=10_000)
def _base_in(path: Path) -> Base | None:
    """Return the base of a file in a folder. Such a file never changes, and its name is never used again."""
    return base_of(contents_of(path).header)


def _kind(error: BaseException) -> str:
    """Return a short name for an error. Messages contain paths and sizes, so they cannot be counted."""
    cause = error.__cause__ if isinstance(error, CacheFileError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    if isinstance(error, CacheFileError) and error.reason in (TOO_LARGE, REPLACED):
        return error.reason
    return type(cause or error).__name__


def _work(queue: SimpleQueue[Work | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # The function may hold arrays. Free them before waiting for the next one.
        del work


def _end(queue: SimpleQueue[Work | None], thread: threading.Thread, index: Index) -> None:
    queue.put(None)
    # The thread itself may drop the last reference, and a thread cannot join itself.
    if thread is not threading.current_thread():
        thread.join()
    index.close()


CANDIDATES = 8
"""The most files that a lookup considers."""


class Kept(NamedTuple):
    """A cache that was loaded from a file, its tokens, and how many of them it can resume from."""

    tokens: tuple[int, ...]
    cache: Any
    point: int


class _DiscardedError(Exception):
    """A file could not be loaded, and has been discarded."""


class DiskTier:
    """Stores caches of one model in a `PrefixFolder`.

    MLX is called on the caller's thread only. The folder's thread writes bytes. All methods raise the errors
    of `PrefixFolder`.

    Args:
        folder: where to store files. Its namespace must identify the model.
        prepare: copies the contents of a cache that holds the given tokens, without those that a base has,
            if there is one and the cache can do so.
        load: loads a cache from a file, and verifies the arrays if the second argument is true.
    """

    def __init__(
        self,
        folder: PrefixFolder,
        prepare: Callable[[Any, Sequence[int], Base | None], Prepared],
        load: Callable[[Path, bool], Any],
    ) -> None:
        self.folder = folder
        self._prepare = prepare
        self._load = load

    def put(self, tokens: Sequence[int], salt: Hashable, cache: Any) -> bool:
        """Copy a cache, queue the copy, and return whether it will be written.

        The caller may close the cache afterwards.
        """
        if self.folder.has(tokens, salt):
            return False
        prepared = self._prepare(cache, tokens, self.folder.base(tokens, salt))
        return self.folder.put(tokens, salt, prepared.write, prepared.nbytes, prepared.base)

    def closest(self, tokens: Sequence[int], salt: Hashable) -> list[tuple[int, ...]]:
        """Return the tokens of the files that share the most first tokens."""
        return [found.tokens for _, found in islice(self.folder.matches(tokens, salt), CANDIDATES)]

    def nearest(self, tokens: Sequence[int], salt: Hashable, more_than: int) -> Kept | None:
        """Load the cache that can resume from the longest prefix of these tokens.

        At least one token is always left to compute. Returns None if no file can resume after more than
        `more_than` tokens.
        """
        while True:
            # Once a file is discarded, others come to light.
            with suppress(_DiscardedError):
                return self._nearest(tokens, salt, more_than)

    def _nearest(self, tokens: Sequence[int], salt: Hashable, more_than: int) -> Kept | None:
        point, chosen = more_than, None
        for common, found in islice(self.folder.matches(tokens, salt), CANDIDATES):
            most = min(common, len(tokens) - 1)
            if most <= point:
                break
            # Every cache can resume at its end, and no other file saves more. Otherwise, ask for the resume
            # point first, which needs no arrays.
            is_best = most == len(found.tokens)
            cache = self._loaded(found, verify=is_best)
            if cache is None:
                continue
            resumes = cache.resume_point(most)
            if is_best and resumes == most:
                self.folder.touch(found)
                return Kept(found.tokens, cache, most)
            if resumes > point:
                point, chosen = resumes, found
            cache.close()
        if chosen is None:
            return None
        cache = self._loaded(chosen, verify=True)
        if cache is None:
            return None
        self.folder.touch(chosen)
        return Kept(chosen.tokens, cache, point)

    def close(self) -> None:
        """As `PrefixFolder.close`."""
        self.folder.close()

    def _loaded(self, found: Found, verify: bool) -> Any:
        """Load a file, or return None if it is too long. Discards a file that is corrupt or missing."""
        try:
            return self._load(found.path, verify)
        except CacheFullError:
            # The file exceeds this pool's capacity, but it may fit other pools.
            return None
        except CacheFileError as error:
            self.folder.discard(found)
            raise _DiscardedError from error
