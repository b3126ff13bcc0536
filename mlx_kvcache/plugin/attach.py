"""Makes the tools of mlx-lm use the caches of this package, and undoes it.

While a model is attached, functions of mlx-lm that make, save and store prompt caches are replaced wherever
a module of mlx-lm has imported them. The last `detach` puts the originals back. Before that, `check_contract`
compares the installed mlx-lm with the functions and caches that this plug-in supports.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.models import cache as mlx_lm_cache

from ..arguments import class_of
from ..errors import NotSupportedError
from .cache_options import check_options, reusable
from .entries.arrays import ArraysCache
from .entries.keyvalue import ChunkedKVCache, KVCache, RotatingKVCache
from .entries.nested import CacheList
from .files import save_for_mlx_lm
from .hosts.mlx_lm import own_cache
from .hosts.observe import PerModel, observe
from .prompt_cache import make_prompt_cache
from .serving import mlx_lm_store, server

_FUNCTIONS = {
    "models.cache.make_prompt_cache": "model max_kv_size",
    "models.cache.save_prompt_cache": "file_name cache metadata",
    "models.cache.LRUPromptCache.fetch_nearest_cache": "self model tokens",
    "models.cache.LRUPromptCache.insert_cache": "self model tokens prompt_cache cache_type",
    "models.cache.PromptTrie.search": "self model tokens",
    "models.cache.PromptTrie.get": "self model tokens",
    "models.cache.PromptTrie.add": "self model tokens value",
    "models.cache.PromptTrie.pop_prefixes": "self model tokens",
    "models.base.create_attention_mask": "h cache window_size return_array",
    "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
}
"""Functions of mlx-lm that the plug-in calls or replaces, with the parameters that it expects."""

_CLASSES = (
    (mlx_lm_cache.KVCache(), KVCache),
    (mlx_lm_cache.RotatingKVCache(8), RotatingKVCache),
    (mlx_lm_cache.ChunkedKVCache(8), ChunkedKVCache),
    (mlx_lm_cache.ArraysCache(1), ArraysCache),
    (mlx_lm_cache.CacheList(mlx_lm_cache.KVCache()), CacheList),
)
"""Caches of mlx-lm, each with the entry that stands in for it."""

_NOT_ANSWERED = {"from_state", "step"}
"""Attributes that entries need not have: loading a file makes caches of mlx-lm, and `step` is internal."""


def check_contract() -> None:
    """Raises NotSupportedError if the installed mlx-lm differs from what this plug-in supports."""
    for path, parameters in _FUNCTIONS.items():
        found, known = _parameters(path), parameters.split()
        if found[: len(known)] != known:
            raise _unknown(f"{path} takes {found}, expected {known}")
    for theirs, ours in _CLASSES:
        public = {name for name in dir(theirs) if not name.startswith("_")}
        extra = sorted(public - set(dir(ours)) - _NOT_ANSWERED)
        if extra:
            raise _unknown(f"{class_of(theirs)} has {', '.join(extra)}")


def _parameters(path: str) -> list[str]:
    """Returns the parameters of a function or method in `mlx_lm`; an empty list if there is none."""
    package, module, *names = path.split(".")
    found: Any = importlib.import_module(f"mlx_lm.{package}.{module}")
    for name in names:
        found = getattr(found, name, None)
    return list(inspect.signature(found).parameters) if callable(found) else []


def _unknown(difference: str) -> NotSupportedError:
    return NotSupportedError(
        f"mlx-lm {mlx_lm.__version__} is not supported: {difference}. Use mlx-lm 0.32.2, or a newer version "
        "of mlx_kvcache"
    )


_original = mlx_lm_cache.make_prompt_cache
_original_save = mlx_lm_cache.save_prompt_cache
_all_models: list[dict[str, Any]] = []
"""The options of each call of `attach_all`."""


class Attachment(AbstractContextManager["Attachment"]):
    """Returned by `attach`: a context manager that detaches the model on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __exit__(self, *error: object) -> None:
        detach(self.model)


def attach(model: nn.Module, **options: Any) -> Attachment:
    """Makes every tool of mlx-lm use the caches of this package for this model.

    Other programs use them too if they call `make_prompt_cache` of mlx-lm or `make_cache` of the model.
    The result detaches on exit. `attach` may be called again with other options; each call needs its own
    `detach`, which restores the options of the call before.

    When a tool of mlx-lm asks for `max_kv_size=N`, the cache gets `capacity=N, overflow="shift", sinks=4`.
    A program that imported `make_prompt_cache` by name before the first `attach` gets no such limit: pass
    `capacity` to `attach` instead.

    Args:
        model: an mlx-lm model. If a model wraps another one, as those of mlx-vlm do, attach the inner one.
        options: those of `make_prompt_cache`.

    Raises:
        TypeError, ValueError: as `make_prompt_cache`.
        NotSupportedError: as `make_prompt_cache`, or the installed version of mlx-lm is not supported.
    """
    check_contract()
    check_options(options, "attach")
    options = reusable(options)
    make_prompt_cache(model, **options).close()
    _attached.of(model).append((options, observe(model, _make_cache)))
    _bind_all()
    return Attachment(model)


def detach(model: nn.Module) -> None:
    """Undoes the last `attach` of this model. Raises ValueError if the model is not attached."""
    attached = _attached.get(model)
    if not attached:
        raise ValueError(f"cannot detach: this {class_of(model)} is not attached")
    _, end_observation = attached.pop()
    end_observation()
    _bind_all()


def attach_all(**options: Any) -> None:
    """Attaches every model that a tool of mlx-lm makes a cache for, until the process ends.

    Raises NotSupportedError if the installed version of mlx-lm is not supported. Other errors of `attach` are
    raised when a tool makes a cache.
    """
    check_contract()
    check_options(options, "attach_all")
    _all_models.append(reusable(options))
    _bind_all()


def _dispatch(model: nn.Module, max_kv_size: int | None = None) -> Any:
    """Replaces `make_prompt_cache` of mlx-lm while a model is attached."""
    all_options = [options for options, _ in _attached.get(model) or ()] or _all_models
    if not all_options:
        return _original(model, max_kv_size)
    chosen = all_options[-1]
    if max_kv_size is not None:
        chosen = chosen | {"capacity": max_kv_size, "overflow": "shift", "sinks": min(4, max_kv_size - 1)}
    return make_prompt_cache(model, **chosen)


def _make_cache(model: nn.Module) -> list[Any]:
    """Replaces `make_cache` of an attached model, which every `make_prompt_cache` of mlx-lm calls first."""
    # A subclass of an attached model's class still calls this after the model is detached.
    return _dispatch(model) if _attached.get(model) else own_cache(model)


def _save(file_name: str, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Replaces `save_prompt_cache` of mlx-lm, which would write quantized windows as if they were floats."""
    if mlx_lm_store.is_ours(cache):
        path = Path(file_name)
        # MLX adds this suffix to a name that has none.
        save_for_mlx_lm(path if path.suffix else path.with_suffix(".safetensors"), cache, metadata)
    else:
        _original_save(file_name, cache, metadata)


def _bind_all() -> None:
    """Installs our functions in mlx-lm while any model is attached, and its own otherwise. Takes no lock."""
    while True:
        is_attached = bool(_attached or _all_models)
        _bind("make_prompt_cache", _original, _dispatch, is_attached)
        _bind("save_prompt_cache", _original_save, _save, is_attached)
        server.patch(is_attached)
        # Another thread, or the finalizer of a model, may have attached or detached in between.
        if is_attached == bool(_attached or _all_models):
            return


def _bind(name: str, theirs: Any, ours: Any, is_attached: bool) -> None:
    """Installs our function, or theirs, in every module of mlx-lm that has imported it under this name."""
    old, new = (theirs, ours) if is_attached else (ours, theirs)
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "mlx_lm" and getattr(module, name, None) is old:
            setattr(module, name, new)


_attached: PerModel[list[tuple[dict[str, Any], Callable[[], None]]]] = PerModel(list, gone=_bind_all)
"""For each `attach` that has not been undone, oldest first: its options, and the end of its observation."""
