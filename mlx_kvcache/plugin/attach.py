"""Making mlx-lm's own tools use these caches, and putting everything back."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..arguments import class_of
from . import reuse
from .bits import reusable
from .contract import check_contract
from .loading import save_for_mlx_lm
from .making import check_options
from .prompt_cache import PromptCache, make_prompt_cache

_original = mlx_lm_cache.make_prompt_cache
_original_save = mlx_lm_cache.save_prompt_cache
_lock = threading.RLock()
_attached: dict[int, list[dict[str, Any]]] = {}
"""For each attached model, by id: the options of each attach that has not been detached."""
_all_models: list[dict[str, Any]] = []
"""The options of each `attach_all`."""


class Attachment:
    """What `attach` returns: as a context manager it detaches at the end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        detach(self.model)


def attach(model: nn.Module, **options: Any) -> Attachment:
    """From here on every mlx-lm tool on this model uses this package's caches.

    Takes the options of `make_prompt_cache`. Where a tool asks for `max_kv_size=N`, that
    becomes `capacity=N, overflow="shift", sinks=4`. May be called again with other options;
    each call needs its own `detach`, which brings the options before it back.

    Raises:
        TypeError, ValueError: as `make_prompt_cache`.
        NotSupportedError: as `make_prompt_cache`, or a version of mlx-lm that is not known.
    """
    check_contract()
    check_options(options, "attach")
    options = reusable(options)
    make_prompt_cache(model, **options).close()
    with _lock:
        if not _attached and not _all_models:
            _patch()
        if id(model) not in _attached:
            weakref.finalize(model, _forget, id(model))
        _attached.setdefault(id(model), []).append(options)
    return Attachment(model)


def detach(model: nn.Module) -> None:
    """Undo one `attach` of this model. Raises ValueError if there is none."""
    with _lock:
        if id(model) not in _attached:
            raise ValueError(f"this {class_of(model)} is not attached")
        _attached[id(model)].pop()
        if not _attached[id(model)]:
            _forget(id(model))


def attach_all(**options: Any) -> None:
    """Attach every model that a tool of mlx-lm makes a cache for, until the process ends.

    Raises:
        NotSupportedError: a version of mlx-lm that is not known. What else `attach` raises
            comes when a model is used.
    """
    check_contract()
    check_options(options, "attach_all")
    with _lock:
        if not _attached and not _all_models:
            _patch()
        _all_models.append(reusable(options))


def _forget(key: int) -> None:
    with _lock:
        if _attached.pop(key, None) is not None and not _attached and not _all_models:
            _restore()


def _dispatch(model: nn.Module, max_kv_size: int | None = None) -> Any:
    """Stands in for mlx-lm's `make_prompt_cache` while a model is attached."""
    options = _attached.get(id(model)) or _all_models
    if not options:
        return _original(model, max_kv_size)
    chosen = options[-1]
    if max_kv_size is not None:
        chosen = chosen | {"capacity": max_kv_size, "overflow": "shift", "sinks": min(4, max_kv_size - 1)}
    cache: PromptCache = make_prompt_cache(model, **chosen)
    return cache


def _save(file_name: str, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Stands in for mlx-lm's `save_prompt_cache`, which would write packed windows as if in float."""
    if reuse.is_ours(cache):
        path = Path(file_name)
        # As MLX does it.
        save_for_mlx_lm(path if path.suffix else path.with_suffix(".safetensors"), cache, metadata)
    else:
        _original_save(file_name, cache, metadata)


def _patch() -> None:
    _bind("make_prompt_cache", _original, _dispatch)
    _bind("save_prompt_cache", _original_save, _save)
    reuse.LRUPromptCache.fetch_nearest_cache = reuse.fetch_nearest_cache
    reuse.LRUPromptCache.insert_cache = reuse.insert_cache


def _restore() -> None:
    _bind("make_prompt_cache", _dispatch, _original)
    _bind("save_prompt_cache", _save, _original_save)
    reuse.LRUPromptCache.fetch_nearest_cache = reuse.original_fetch
    reuse.LRUPromptCache.insert_cache = reuse.original_insert


def _bind(function: str, old: Any, new: Any) -> None:
    """Replace `old` wherever a module of mlx-lm has bound the function's name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "mlx_lm" and getattr(module, function, None) is old:
            setattr(module, function, new)
