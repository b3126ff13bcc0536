"""Makes a `SessionPool` for a model: a prefix cache in memory and, optionally, in a folder.

When the model's weights change, the pool drops its caches and continues with those files that were written
with the new weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ...errors import CacheError, NotSupportedError
from ...persist.disk_cache import DiskTier, PrefixFolder
from ...persist.files import Base, Prepared
from ...sessions.prefix_cache import SessionPool
from ...sessions.session import Branch
from ..cache_options import Storage, check_options, options_of, reusable
from ..files import loaded
from ..hosts.layout import language_model_of
from ..pool.conversation import Limits
from ..pool.weights import fingerprint, version_of
from ..prompt_cache import PromptCache, make_prompt_cache
from ..ranks import ranks_of


def make_session_pool(
    model: nn.Module,
    max_bytes: int | None = None,
    max_stored: int | None = None,
    folder: str | PathLike[str] | None = None,
    folder_bytes: int = 10 * 2**30,
    tokenizer: Any = None,
    **options: Any,
) -> SessionPool:
    """Make a prefix cache of a model's conversations, in memory and optionally in a folder.

    Caches evicted from memory are written to the folder. They are loaded again when a conversation begins
    with the same tokens, also after a restart and in other processes that use the folder.

    Args:
        max_bytes, max_stored: as in `SessionPool`.
        folder: a folder on a local file system; "~" is expanded, and a missing folder is created.
        folder_bytes: the maximum total size of the folder's files, in bytes.
        tokenizer: if given, files saved with another tokenizer are not used, and `Session.departure` shows
            tokens as text.
        options: options of `make_prompt_cache`.

    Raises:
        TypeError, ValueError, NotSupportedError: as `make_prompt_cache`, or the group has several ranks.
        CacheFileError: the folder cannot be used.
    """
    own = ("max_bytes", "max_stored", "folder", "folder_bytes", "tokenizer")
    check_options(options, "make_session_pool", own)
    if not ranks_of(options.get("group")).is_alone:
        raise NotSupportedError(
            "session pools are not supported with ranks: each rank would evict different conversations; "
            "pass no group"
        )
    model, options = language_model_of(model), reusable(options)
    # They override the options in files, so that all caches share a pool.
    all_options = Limits()._asdict() | Storage()._asdict() | options

    def prepare(cache: PromptCache, tokens: Sequence[int], base: Base | None) -> Prepared:
        return cache._prepared(tokens, tokenizer, base)

    def load(path: Path, verify: bool) -> PromptCache:
        # A file that is not verified is only asked for its resume points, so its arrays stay lazy.
        return PromptCache(loaded(path, model, tokenizer, verify, all_options, lazy=not verify)[0])

    def tier(made: PromptCache) -> DiskTier | None:
        if folder is None:
            return None
        # Only files of the same model with the same storage options are used.
        saved = options_of(made._conversation)
        storage = {name: saved.get(name) for name in ("kv_bits", "kv_group_size", "quantize_after")}
        storage |= {name: saved[name] for name in ("kv_transform", "kv_text") if name in saved}
        text = json.dumps([fingerprint(model, tokenizer), storage], sort_keys=True)
        namespace = hashlib.sha256(text.encode()).hexdigest()
        return DiskTier(PrefixFolder(Path(folder).expanduser(), folder_bytes, namespace), prepare, load)

    return _ModelSessions(
        model, partial(make_prompt_cache, model, **options), max_bytes, max_stored, tier, tokenizer
    )


def picture_key(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return what a `SessionPool` needs to tell prompts with pictures apart: tokens, and a salt.

    The placeholder tokens of a picture are the same for all pictures. Here they are replaced by a number made
    from the picture's content, so that two prompts share what comes before the first picture that differs,
    and nothing after it.

    Args:
        model: a model of mlx-vlm.
        inputs: what mlx-vlm's `prepare_inputs` returns for one prompt: "input_ids" (1, n), "pixel_values" and
            others.

    Returns:
        The tokens: those before the first picture only, if its content is not among the inputs; and the salt,
        which stands for media that have no place among the tokens, such as audio.

    Raises:
        ValueError: the inputs are of several prompts.
    """
    from .mlx_vlm_media import placeholders, request_of  # mlx-vlm may not be installed

    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ValueError(f"input_ids must be of one prompt, with shape (1, n); got {tuple(ids.shape)}")
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    request = request_of(ids[0].tolist(), others, placeholders(model))
    return list(request.key), request.salt


class _ModelSessions(SessionPool):
    """A session pool that drops its caches when the model's weights change.

    Args:
        tier: makes the disk tier for the model's present weights, given a cache of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[], PromptCache],
        max_bytes: int | None,
        max_stored: int | None,
        tier: Callable[[PromptCache], DiskTier | None],
        tokenizer: Any,
    ) -> None:
        first = make()
        super().__init__(make, max_bytes, max_stored, tier(first), tokenizer)
        self._model = model
        self._tier = tier
        self._version = first.pool.version

    def store(
        self, tokens: Sequence[int], cache: Branch, salt: Hashable = None, is_pinned: bool = False
    ) -> bool:
        self._renew()
        pool = getattr(cache, "pool", None)
        if pool and pool.model is self._model and pool.version is not self._version:
            return self._reject("computed with other weights", cache)
        return super().store(tokens, cache, salt, is_pinned)

    def _renew(self) -> None:
        """If the model's weights have changed, drop all caches and switch to the files of the new weights."""
        version = version_of(self._model)
        with self._lock:
            if version is self._version:
                return
            self._version, self._cells = version, None
            disk, self._disk = self._disk, None
        self.clear()
        if disk:
            # The files of the old weights stay, in case the model gets these weights back.
            disk.close()
            try:
                self._disk = self._tier(self._make())
            except CacheError as error:
                self._count_failure(error)
