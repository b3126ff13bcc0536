"""A second place for caches that have to leave memory: a folder of files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import CacheFileError, CacheFullError
from .files import Prepared
from .folder import Found, PrefixFolder

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
