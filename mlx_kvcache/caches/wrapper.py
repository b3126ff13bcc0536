"""Several caches used as one, for models whose layers need different kinds of cache."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..batch import Batch, CacheConfig, CausalOptions
from ..errors import CacheError, NotSupportedError
from ..quantization import Quantization
from .base import KeyValueCache, PlanningCache
from .interface import Recurrent
from .plan import JointPlan, Plan


class WrapperCache(PlanningCache):
    """Combines caches of several kinds, for models whose layers differ.

    Every batch and every edit changes all children, or none if one of them refuses. `put`, `get`, `layer` and
    `set_causal` go to the underlying cache: the child of the current layer type. `set_layer_type` chooses it;
    each forward pass begins with layer type 0.

    Args:
        caches: the children, in the order of layer types. Call `init` on the wrapper, not on them.

    Raises:
        ValueError: there is no child, or one is given twice.
        TypeError: a child is not a cache of this package.
    """

    def __init__(self, *caches: PlanningCache) -> None:
        super().__init__()
        for child in caches:
            if not isinstance(child, PlanningCache):
                raise TypeError(f"every argument must be a cache, got {type(child).__name__}")
        if not caches or len(set(map(id, caches))) < len(caches):
            raise ValueError(
                "a wrapper needs one or more different caches, "
                f"got {len(caches)} of which {len(set(map(id, caches)))} are different"
            )
        self._children = caches
        self._type = 0

    def set_layer_type(self, layer_type: int) -> None:
        """Choose the underlying cache by its index. Raises ValueError if no child has it."""
        self._check_open()
        layer_type = operator.index(layer_type)
        if not 0 <= layer_type < len(self._children):
            raise ValueError(f"layer type must be 0 to {len(self._children) - 1}, got {layer_type}")
        self._type = layer_type

    @property
    def underlying_cache(self) -> PlanningCache:
        """The child of the current layer type."""
        return self._children[self._type]

    @property
    def key_value_cache(self) -> KeyValueCache:
        """The underlying cache. Raises NotSupportedError if it holds no keys and values."""
        child = self.underlying_cache
        if isinstance(child, WrapperCache):
            return child.key_value_cache
        if not isinstance(child, KeyValueCache):
            raise NotSupportedError(
                f"layer type {self._type} is a {type(child).__name__}, which holds no keys and values; "
                "choose another with set_layer_type"
            )
        return child

    @property
    def nbytes(self) -> int:
        return sum(child.nbytes for child in self._children)

    def check(self) -> None:
        for child in self._children:
            child.check()

    def set_config(self, config: CacheConfig) -> None:
        """As `Cache.set_config`, for all children."""
        with self._reset_on_error("_config"):
            super().set_config(config)
            for child in self._children:
                child.set_config(config)

    def set_layer(self, layer: int) -> None:
        """As `Cache.set_layer`, for all children."""
        with self._reset_on_error("_layer"):
            super().set_layer(layer)
            for child in self._children:
                child.set_layer(layer)

    @contextmanager
    def _reset_on_error(self, name: str) -> Iterator[None]:
        """On an exception, reset this attribute of the wrapper and of all children to the wrapper's value."""
        before = getattr(self, name)
        try:
            yield
        except BaseException:
            for cache in (*self._children, self):
                setattr(cache, name, before)
            raise

    def layer(self, layer: int) -> Any:
        """Return a handle on one layer of the underlying cache."""
        return self._underlying().layer(layer)

    def put(self, *arrays: Any, **more: Any) -> None:
        """Call `put` of the underlying cache."""
        self._underlying().put(*arrays, **more)

    def get(self, **more: Any) -> Any:
        """Call `get` of the underlying cache."""
        return self._underlying().get(**more)

    def _underlying(self) -> Any:
        self._check_ready()
        return self.underlying_cache

    def _open(self, dtype: mx.Dtype | None, room: int, quantization: Quantization | None) -> None:
        for index, child in enumerate(self._children):
            child._check_open()
            if child._ready:
                raise CacheError(f"child {index} is already initialized: call init on the wrapper only")
        for child in self._children:
            child.init(dtype, 1, room, self._max_batch, quantization)

    def _unready(self) -> None:
        super()._unready()
        for child in self._children:
            child._unready()

    def _plan_forward(self, batch: Batch) -> Plan:
        return _ForwardPlan(self, [child._plan_forward(batch) for child in self._children])

    def _plan_reserve(self, batch: Batch) -> Plan:
        return _ForwardPlan(self, [child._plan_reserve(batch) for child in self._children])

    def _plan_remove(
        self, sequence: int, begin: int, end: int | None, recurrent: Recurrent = "refuse"
    ) -> Plan:
        return JointPlan([child._plan_remove(sequence, begin, end, recurrent) for child in self._children])

    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        return JointPlan([child._plan_copy(src, dst, length) for child in self._children])

    def _plan_graft(self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent) -> Plan:
        children = self._children
        return JointPlan([child._plan_graft(source, begin, end, sequence, recurrent) for child in children])

    def _snapshot(self, sequence: int) -> list[Any]:
        return [child._snapshot(sequence) for child in self._children]

    def _plan_restore(self, sequence: int, snapshot: list[Any]) -> Plan:
        children = zip(self._children, snapshot, strict=True)
        return JointPlan([child._plan_restore(sequence, part) for child, part in children])

    def _set_causal(self, options: CausalOptions) -> None:
        self.underlying_cache.set_causal(options)

    def _can_resume(self, sequence: int, position: int) -> bool:
        return all(child._can_resume(sequence, position) for child in self._children)

    def _end(self, sequence: int) -> int:
        return self._children[0]._end(sequence)

    def _close(self) -> None:
        for child in self._children:
            child.close()


class _ForwardPlan(JointPlan):
    """A forward pass of all children, which begins with layer type 0."""

    def __init__(self, wrapper: WrapperCache, plans: list[Plan]) -> None:
        super().__init__(plans)
        self._wrapper = wrapper
        self._last = wrapper._type

    def make(self) -> None:
        super().make()
        self._wrapper._type = 0

    def unmake(self) -> None:
        super().unmake()
        self._wrapper._type = self._last

    def finish(self) -> None:
        for index, plan in enumerate(self._plans):
            try:
                plan.finish()
            except CacheError as error:
                raise CacheError(f"layer type {index}: {error}") from None
