"""Makes the tools of a model's host use the caches of this package, and undoes it.

While a model is attached, functions of its host that make, save and store prompt caches are replaced wherever
a module of the host has imported them. The last `detach` puts the originals back. Before that, the installed
host is compared with the functions and caches that this plug-in supports.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.nn as nn

from ..arguments import class_of, share, whole
from ..errors import NotSupportedError
from .cache_options import check_options, reusable
from .entries.arrays import ArraysCache
from .entries.keyvalue import ChunkedKVCache, KVCache, RotatingKVCache
from .entries.nested import CacheList
from .hosts.host import Host
from .hosts.layout import HOSTS, host_of, language_model_of, own_cache
from .hosts.mlx_lm import MLX_LM
from .hosts.observe import PerModel, observe
from .prompt_cache import PromptCache, make_prompt_cache
from .serving.mlx_lm_splice import set_splicing

SPLICING = {"cache_reuse": 0, "cache_recompute": 0.0}
"""The options of `attach` that are not those of a cache, with their defaults."""

_all_models: list[tuple[Host, dict[str, Any]]] = []
"""The host and the options of each call of `attach_all`."""


def check_contract(host: Host = MLX_LM) -> None:
    """Raises NotSupportedError if the installed host differs from what this plug-in supports."""
    caches = host.caches
    host.check(
        (
            (caches.KVCache(), KVCache),
            (caches.RotatingKVCache(8), RotatingKVCache),
            (caches.ChunkedKVCache(8), ChunkedKVCache),
            (caches.ArraysCache(1), ArraysCache),
            (caches.CacheList(caches.KVCache()), CacheList),
        )
    )


class Attachment(AbstractContextManager["Attachment"]):
    """Returned by `attach`: a context manager that detaches the model on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __exit__(self, *error: object) -> None:
        detach(self.model)


def attach(model: nn.Module, **options: Any) -> Attachment:
    """Makes every tool of the model's host, mlx-lm or mlx-vlm, use the caches of this package for this model.

    Other programs use them too if they call `make_prompt_cache` of the host or `make_cache` of the model.
    The result detaches on exit. `attach` may be called again with other options; each call needs its own
    `detach`, which restores the options of the call before.

    When a tool of the host asks for `max_kv_size=N`, the cache gets `capacity=N, overflow="shift", sinks=4`.
    A program that imported `make_prompt_cache` by name before the first `attach` gets no such limit: pass
    `capacity` to `attach` instead.

    Args:
        model: a model of mlx-lm or mlx-vlm. Of a vision model, the language model inside it is attached.
        options: those of `make_prompt_cache`, and for servers `cache_reuse` and `cache_recompute`. If
            a prompt changes before its end, the server also reuses every later run of `cache_reuse` tokens
            that a stored conversation has, and computes again this part of each: 0.0 to 1.0. Logits then
            differ slightly from those of a fresh computation; see `PromptCache.splice`.

    Raises:
        TypeError, ValueError: as `make_prompt_cache`.
        NotSupportedError: as `make_prompt_cache`, or the installed version of the host is not supported.
    """
    host = host_of(model)
    check_contract(host)
    options = _checked(options, "attach")
    model = host.language_model(model)
    _made(model, options).close()
    _attached.of(model).append((options, observe(model, _make_cache)))
    _bind_all()
    return Attachment(model)


def detach(model: nn.Module) -> None:
    """Undoes the last `attach` of this model. Raises ValueError if the model is not attached."""
    attached = _attached.get(language_model_of(model))
    if not attached:
        raise ValueError(f"cannot detach: this {class_of(model)} is not attached")
    _, end_observation = attached.pop()
    end_observation()
    _bind_all()


def attach_all(host: Host = MLX_LM, **options: Any) -> None:
    """Attaches every model that a tool of a host makes a cache for, until the process ends.

    Raises NotSupportedError if the host is not installed or its version not supported. Other errors of
    `attach` are raised when a tool makes a cache.
    """
    if not host.is_installed:
        raise NotSupportedError(f"{host.name} is not installed: pip install {host.name}")
    check_contract(host)
    _all_models.append((host, _checked(options, "attach_all")))
    _bind_all()


def _checked(options: dict[str, Any], function: str) -> dict[str, Any]:
    """The options, which can be used for several caches. Raises TypeError or ValueError if they are wrong."""
    own = {name: options[name] for name in SPLICING if name in options}
    others = {name: value for name, value in options.items() if name not in own}
    check_options(others, function, tuple(SPLICING))
    min_run, recompute = (SPLICING | own).values()
    whole(cache_reuse=min_run)
    share(cache_recompute=recompute)
    return reusable(others) | own


def _made(model: nn.Module, options: dict[str, Any]) -> PromptCache:
    """A cache with the options of `attach`."""
    set_splicing(model, *(options.get(name, default) for name, default in SPLICING.items()))
    return make_prompt_cache(model, **{name: own for name, own in options.items() if name not in SPLICING})


def _options_of(model: nn.Module) -> dict[str, Any] | None:
    """The options of the last `attach` of a model, or of `attach_all` for its host; None if there is none."""
    attached = _attached.get(model)
    if attached:
        return attached[-1][0]
    every = [options for host, options in _all_models if host is host_of(model)]
    return every[-1] if every else None


def _dispatch(host: Host, model: nn.Module, max_kv_size: int | None = None) -> Any:
    """Replaces `make_prompt_cache` of a host while a model is attached."""
    chosen = _options_of(model)
    if chosen is None:
        return host.make_prompt_cache(model, max_kv_size)
    if max_kv_size is not None:
        chosen = chosen | {"capacity": max_kv_size, "overflow": "shift", "sinks": min(4, max_kv_size - 1)}
    return _made(model, chosen)


_dispatchers = {host: functools.partial(_dispatch, host) for host in HOSTS}
"""A model that is not attached gets what the host whose tool asks would make."""


def _make_cache(model: nn.Module) -> list[Any]:
    """Replaces `make_cache` of an attached model, which every `make_prompt_cache` of a host calls first."""
    # A subclass of an attached model's class still calls this after the model is detached.
    return _dispatch(host_of(model), model) if _attached.get(model) else own_cache(model)


def _bind_all() -> None:
    """Installs our functions in hosts while any model is attached, and theirs otherwise. Takes no lock."""
    # When the process ends, modules go before the last models.
    while not sys.is_finalizing():
        is_attached = bool(_attached or _all_models)
        for host in HOSTS:
            if sys.modules.get(host.package):
                _bind("make_prompt_cache", host, host.make_prompt_cache, _dispatchers[host], is_attached)
                tools = importlib.import_module(host.tools, __package__)
                for name, (theirs, ours) in tools.FUNCTIONS.items():
                    _bind(name, host, theirs, ours, is_attached)
                tools.patch(is_attached)
        # Another thread, or the finalizer of a model, may have attached or detached in between.
        if is_attached == bool(_attached or _all_models):
            return


def _bind(name: str, host: Host, theirs: Any, ours: Any, is_attached: bool) -> None:
    """Installs our function, or theirs, in every module of a host that has imported it under this name."""
    old, new = (theirs, ours) if is_attached else (ours, theirs)
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == host.package and getattr(module, name, None) is old:
            setattr(module, name, new)


_attached: PerModel[list[tuple[dict[str, Any], Callable[[], None]]]] = PerModel(list, gone=_bind_all)
"""For each `attach` that has not been undone, oldest first: its options, and the end of its observation."""
