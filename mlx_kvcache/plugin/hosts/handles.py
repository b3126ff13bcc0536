"""Lets each row of a batch attend to its own keys where they lie, mostly without masks.

Most models of the hosts only pass the results of `update_and_fetch` and `make_mask` on to
`scaled_dot_product_attention`. Such models get handles instead of arrays, and the function in
their modules is replaced by one that computes attention when it receives a handle. A handle
supports nothing else, so a model that needs arrays fails in the trial run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...attend.products import STRETCH, attend_causal, attend_single
from ...storage import codec
from .layout import Leaf, host_of
from .observe import Observable

_NAME = "scaled_dot_product_attention"
_users: dict[str, set[object]] = {}
"""For each model module, by name, a token for every active `serve`."""


class Attends(Protocol):
    """A forward that computes attention to its own stored keys."""

    def attend(
        self, leaf: Leaf, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array: ...


class Ragged:
    """Handle for the keys or the values of a leaf in a forward."""

    __slots__ = ("forward", "leaf")

    def __init__(self, forward: Attends, leaf: Leaf) -> None:
        self.forward = forward
        self.leaf = leaf


class RaggedMask:
    """Handle for the mask of a leaf's visibility rule, narrowed by `window_size` as in `make_mask`."""

    __slots__ = ("leaf", "window_size")

    def __init__(self, leaf: Leaf, window_size: int | None) -> None:
        self.leaf = leaf
        self.window_size = window_size


@functools.cache
def attending(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that replaces a host's `scaled_dot_product_attention`."""

    @functools.wraps(original)
    def attend(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any = None,
        scale: float = 1.0,
        mask: Any = None,
        sinks: mx.array | None = None,
        **more: Any,
    ) -> mx.array:
        if isinstance(keys, Ragged):
            return keys.forward.attend(keys.leaf, queries, scale, mask, sinks)
        if isinstance(cache, Observable) and not more:
            if sinks is None and codec.is_cpu():
                if mask is None and queries.shape[0] == queries.shape[2] == 1:
                    return attend_single(queries, keys, values, scale)
                if isinstance(mask, str) and queries.shape[2] > STRETCH:
                    return attend_causal(queries, keys, values, scale)
            # As the host does after it has looked for quantized caches of its own.
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        result: mx.array = original(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks, **more
        )
        return result

    return attend


def serve(model: nn.Module) -> Callable[[], None]:
    """Make the modules of a model accept handles until the returned function is called.

    The returned function is safe in finalizers: it takes no lock, does not keep the model alive, and
    may be called twice.
    """
    original = host_of(model).attention
    user, names = object(), {type(module).__module__ for module in model.modules()}
    for name in names:
        _users.setdefault(name, set()).add(user)
        _bind(name, original)

    def leave() -> None:
        for name in names:
            _users[name].discard(user)
            _bind(name, original)

    return leave


def _bind(name: str, original: Callable[..., Any]) -> None:
    """Give a module the function that its users need, unless other code has replaced it."""
    module, attend = sys.modules.get(name), attending(original)
    while True:
        old, new = (original, attend) if _users[name] else (attend, original)
        if getattr(module, _NAME, None) is not old:
            return
        # Another thread may change the users in between, so check again.
        setattr(module, _NAME, new)
