"""A `SessionPool` for an mlx-lm model, with a folder behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ...errors import CacheError, NotSupportedError
from ...persist.disk_cache import DiskTier, PrefixFolder
from ...persist.files import Prepared
from ...sessions.pool import SessionPool
from ...sessions.session import Branch, Session
from ..files import loaded
from ..options import Storage, check_options, options_of, reusable
from ..pool.conversation import Limits
from ..pool.weights import fingerprint, version_of
from ..prompt_cache import PromptCache, make_prompt_cache
from ..ranks import ranks_of

_OWN = ("max_bytes", "max_stored", "folder", "folder_bytes", "tokenizer")


def make_session_pool(
    model: nn.Module,
    max_bytes: int | None = None,
    max_stored: int | None = None,
    folder: str | PathLike[str] | None = None,
    folder_bytes: int = 10 * 2**30,
    tokenizer: Any = None,
    **options: Any,
) -> SessionPool:
    """Conversations of a model by their tokens, in memory and, where a folder is given, beyond.

    What has to leave memory goes to the folder, and comes back when a conversation begins alike:
    also after a restart, and from other processes that use the same folder.

    Args:
        max_bytes, max_stored: as of `SessionPool`.
        folder: on a local file system, "~" for the home; made where it is missing.
        folder_bytes: the most bytes of its files.
        tokenizer: keeps apart what was saved with another one.
        options: of `make_prompt_cache`.

    Raises:
        TypeError, ValueError, NotSupportedError: as `make_prompt_cache`.
        CacheFileError: the folder cannot be used.
    """
    check_options(options, "make_session_pool", _OWN)
    if not ranks_of(options.get("group")).is_alone:
        raise NotSupportedError("a pool on each rank would forget what it has room for, and not the same")

    options = reusable(options)

    def make() -> PromptCache:
        return make_prompt_cache(model, **options)

    def prepare(cache: PromptCache, tokens: Sequence[int]) -> Prepared:
        return cache._prepared(tokens, tokenizer)

    def load(path: Path, verify: bool) -> PromptCache:
        # Made as those in memory are, so that they share a pool, whatever the file's own options.
        defaults = Limits()._asdict() | Storage()._asdict()
        # Where it is not verified, nobody wants more than to know how far it can go back.
        rows, _ = loaded(path, model, tokenizer, verify, defaults | options, lazy=not verify)
        return PromptCache(rows)

    def tier(made: PromptCache) -> DiskTier | None:
        if folder is None:
            return None
        name = _namespace(made, fingerprint(model, tokenizer))
        return DiskTier(PrefixFolder(Path(folder).expanduser(), folder_bytes, name), prepare, load)

    return _ModelSessions(model, make, max_bytes, max_stored, tier)


class _ModelSessions(SessionPool):
    """A session pool whose caches serve as long as the model has the weights that they were computed with.

    Args:
        tier: makes the tier for the model as it is now; it is given a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[], PromptCache],
        max_bytes: int | None,
        max_stored: int | None,
        tier: Callable[[PromptCache], DiskTier | None],
    ) -> None:
        first = make()
        super().__init__(make, max_bytes, max_stored, tier(first))
        self._model = model
        self._tier = tier
        self._version = first.pool.version

    def open(self, tokens: Sequence[int], salt: Hashable = None) -> Session:
        self._renew()
        return super().open(tokens, salt)

    def store(
        self, tokens: Sequence[int], cache: Branch, salt: Hashable = None, is_pinned: bool = False
    ) -> bool:
        self._renew()
        pool = getattr(cache, "pool", None)
        if pool and pool.model is self._model and pool.version is not self._version:
            return self._reject("computed with other weights", cache)
        return super().store(tokens, cache, salt, is_pinned)

    def _renew(self) -> None:
        """Where the model has other weights by now, begin anew: in memory, and with the files for these."""
        version = version_of(self._model)
        with self._lock:
            if version is self._version:
                return
            self._version, self._cells = version, None
            disk, self._disk = self._disk, None
        self.clear()
        if disk:
            # What other weights have written stays, for when the model has them again.
            disk.close()
            try:
                self._disk = self._tier(self._make())
            except CacheError as error:
                self._count_failure(error)


def _namespace(cache: PromptCache, model: dict[str, str]) -> str:
    """What caches must have in common to serve each other: the model, and how they are stored."""
    options = options_of(cache._conversation)
    storage = {name: options.get(name) for name in ("kv_bits", "kv_group_size", "quantize_after")}
    return hashlib.sha256(json.dumps([model, storage], sort_keys=True).encode()).hexdigest()
