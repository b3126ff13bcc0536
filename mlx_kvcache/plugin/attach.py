"""Whether the mlx-lm that is installed is one that this plug-in knows.

Making mlx-lm's own tools use these caches, and putting everything back.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.models import cache as mlx_lm_cache

from ..arguments import class_of
from ..errors import NotSupportedError
from .entries.arrays import ArraysCache
from .entries.keyvalue import ChunkedKVCache, KVCache, RotatingKVCache
from .entries.nested import CacheList
from .files import save_for_mlx_lm
from .hosts.layout import own_cache
from .hosts.lifetimes import PerModel
from .hosts.observe import observe
from .options import check_options, reusable
from .prompt_cache import PromptCache, make_prompt_cache
from .serving import prompt_store, server

_FUNCTIONS = {
    "models.cache.make_prompt_cache": ["model", "max_kv_size"],
    "models.cache.save_prompt_cache": ["file_name", "cache", "metadata"],
    "models.cache.LRUPromptCache.fetch_nearest_cache": ["self", "model", "tokens"],
    "models.cache.LRUPromptCache.insert_cache": ["self", "model", "tokens", "prompt_cache", "cache_type"],
    "models.cache.PromptTrie.search": ["self", "model", "tokens"],
    "models.cache.PromptTrie.get": ["self", "model", "tokens"],
    "models.cache.PromptTrie.add": ["self", "model", "tokens", "value"],
    "models.cache.PromptTrie.pop_prefixes": ["self", "model", "tokens"],
    "models.base.create_attention_mask": ["h", "cache", "window_size", "return_array"],
    "models.base.scaled_dot_product_attention": [
        "queries", "keys", "values", "cache", "scale", "mask", "sinks",
    ],
}  # fmt: skip
"""What the plug-in calls or stands in for, with the parameters that it knows."""

_CLASSES = (
    (mlx_lm_cache.KVCache(), KVCache),
    (mlx_lm_cache.RotatingKVCache(8), RotatingKVCache),
    (mlx_lm_cache.ChunkedKVCache(8), ChunkedKVCache),
    (mlx_lm_cache.ArraysCache(1), ArraysCache),
    (mlx_lm_cache.CacheList(mlx_lm_cache.KVCache()), CacheList),
)
"""mlx-lm's caches, and what answers for them."""

_NOT_ANSWERED = {"from_state", "step"}
"""Loading a file makes mlx-lm's own caches, and how buffers grow is nobody's business."""


def check_contract() -> None:
    """Raise NotSupportedError if mlx-lm asks for something that this plug-in does not know."""
    for path, known in _FUNCTIONS.items():
        found = _parameters(path)
        if found[: len(known)] != known:
            raise _unknown(f"{path} takes {found}, expected {known}")
    for theirs, ours in _CLASSES:
        public = {name for name in dir(theirs) if not name.startswith("_")}
        extra = sorted(public - set(dir(ours)) - _NOT_ANSWERED)
        if extra:
            raise _unknown(f"{class_of(theirs)} has {', '.join(extra)}")


def _parameters(path: str) -> list[str]:
    """The parameters of a function or method below `mlx_lm`; none where it is missing."""
    module, _, rest = path.partition(".")
    package, _, rest = rest.partition(".")
    found: Any = importlib.import_module(f"mlx_lm.{module}.{package}")
    for name in rest.split("."):
        found = getattr(found, name, None)
    return list(inspect.signature(found).parameters) if callable(found) else []


def _unknown(what: str) -> NotSupportedError:
    return NotSupportedError(
        f"mlx-lm {mlx_lm.__version__} is not one that this plug-in knows: {what}. Use mlx-lm 0.32.2, or a "
        "newer version of mlx_kvcache"
    )


_original = mlx_lm_cache.make_prompt_cache
_original_save = mlx_lm_cache.save_prompt_cache
_all_models: list[dict[str, Any]] = []
"""The options of each `attach_all`."""


class _Attached(list[dict[str, Any]]):
    """The options of each attach of a model that has not been detached."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[Callable[[], None]] = []


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

    Takes the options of `make_prompt_cache`. Other programs use them too, if they ask mlx-lm's
    `make_prompt_cache` or the model's `make_cache`, however they have imported that. May be called
    again with other options; each call needs its own `detach`, which brings the options before it back.

    Where a tool of mlx-lm asks for `max_kv_size=N`, that becomes `capacity=N, overflow="shift", sinks=4`.
    Programs that have imported `make_prompt_cache` by name before the first `attach` get no such bound:
    give `attach` the `capacity` instead.

    Raises:
        TypeError, ValueError: as `make_prompt_cache`; of a model that wraps another, attach the
            one inside.
        NotSupportedError: as `make_prompt_cache`, or a version of mlx-lm that is not known.
    """
    check_contract()
    check_options(options, "attach")
    options = reusable(options)
    make_prompt_cache(model, **options).close()
    attached = _attached.of(model)
    attached.ends.append(observe(model, _make_cache))
    attached.append(options)
    _bind_all()
    return Attachment(model)


def detach(model: nn.Module) -> None:
    """Undo one `attach` of this model. Raises ValueError if there is none."""
    attached = _attached.get(model)
    if not attached:
        raise ValueError(f"this {class_of(model)} is not attached")
    attached.pop()
    attached.ends.pop()()
    _bind_all()


def attach_all(**options: Any) -> None:
    """Attach every model that a tool of mlx-lm makes a cache for, until the process ends.

    Raises:
        NotSupportedError: a version of mlx-lm that is not known. What else `attach` raises
            comes when a model is used.
    """
    check_contract()
    check_options(options, "attach_all")
    _all_models.append(reusable(options))
    _bind_all()


def _dispatch(model: nn.Module, max_kv_size: int | None = None) -> Any:
    """Stands in for mlx-lm's `make_prompt_cache` while a model is attached."""
    options = _attached.get(model) or _all_models
    if not options:
        return _original(model, max_kv_size)
    chosen = options[-1]
    if max_kv_size is not None:
        chosen = chosen | {"capacity": max_kv_size, "overflow": "shift", "sinks": min(4, max_kv_size - 1)}
    cache: PromptCache = make_prompt_cache(model, **chosen)
    return cache


def _make_cache(model: nn.Module) -> list[Any]:
    """Stands in for an attached model's `make_cache`, which every `make_prompt_cache` asks first."""
    # A user's subclass of the class that an attached model had still asks here after it is detached.
    return _dispatch(model) if _attached.get(model) else own_cache(model)


def _save(file_name: str, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Stands in for mlx-lm's `save_prompt_cache`, which would write packed windows as if in float."""
    if prompt_store.is_ours(cache):
        path = Path(file_name)
        # As MLX does it.
        save_for_mlx_lm(path if path.suffix else path.with_suffix(".safetensors"), cache, metadata)
    else:
        _original_save(file_name, cache, metadata)


def _bind_all() -> None:
    """Let mlx-lm have our functions while any model is attached, and else its own. Takes no lock."""
    while True:
        is_attached = bool(_attached or _all_models)
        ours = _dispatch, _save, prompt_store.fetch_nearest_cache, prompt_store.insert_cache
        theirs = _original, _original_save, prompt_store.original_fetch, prompt_store.original_insert
        old, new = (theirs, ours) if is_attached else (ours, theirs)
        _bind("make_prompt_cache", old[0], new[0])
        _bind("save_prompt_cache", old[1], new[1])
        prompt_store.LRUPromptCache.fetch_nearest_cache, prompt_store.LRUPromptCache.insert_cache = new[2:]
        (server.patch if is_attached else server.restore)()
        # Another thread, or the end of a model, may have changed that meanwhile.
        if is_attached == bool(_attached or _all_models):
            return


def _bind(function: str, old: Any, new: Any) -> None:
    """Replace `old` wherever a module of mlx-lm has bound the function's name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "mlx_lm" and getattr(module, function, None) is old:
            setattr(module, function, new)


_attached = PerModel(_Attached, gone=_bind_all)
