"""The interface of every kind, and the part of it that does not depend on the kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import mlx.core as mx

from ..arrays.mask import Mask
from ..batch import Batch, CacheConfig, CausalOptions
from ..errors import CacheError

History = tuple[mx.array, mx.array, Mask]
"""Keys and values (1, n_kv_heads, S, head_dim), and who of the n tokens sees which of the S."""

Self = TypeVar("Self", bound="PlanningCache")


@runtime_checkable
class Cache(Protocol):
    """What a model needs of a cache, and what an application does with one.

    A forward pass is `start_forward`, then for each layer `put` and `get`. Nothing evaluates
    an array, except `put` after `start_forward(reserve=True)`. After any error the cache is
    as it was before the call.
    """

    def set_config(self, config: CacheConfig) -> None: ...
    def init(
        self, dtype: mx.Dtype = ..., max_sequences: int = ..., capacity: int = ..., max_batch: int = ...
    ) -> None: ...
    def start_forward(self, batch: Batch, reserve: bool = False) -> None: ...
    def set_causal(self, options: CausalOptions) -> None: ...
    def set_layer(self, layer: int) -> None: ...
    def put(self, keys: mx.array, values: mx.array) -> None: ...
    def get(self) -> History: ...
    def layer(self, layer: int) -> Layer: ...
    def copy_prefix(self, src: int, dst: int, length: int) -> None: ...
    def can_resume(self, sequence: int, position: int) -> bool: ...
    def remove(self, sequence: int, begin: int, end: int | None = None) -> None: ...
    def end(self, sequence: int) -> int: ...
    def close(self) -> None: ...


class Plan(ABC):
    """A change that has been computed whole. Neither method can fail."""

    @abstractmethod
    def commit(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Put the bookkeeping back as it was before `commit`; only plans of steps can."""
        raise NotImplementedError


class Layer:
    """One model layer of a cache: `put` and `get` without the mode that `set_layer` sets."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: PlanningCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def put(self, keys: mx.array, values: mx.array) -> None:
        """As `Cache.put`, for this layer."""
        self.cache._put(self.index, keys, values)

    def get(self) -> History:
        """As `Cache.get`, for this layer."""
        return self.cache._get(self.index)

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        return self.cache._attend(self.index, queries, keys, values, scale, sinks)


class PlanningCache(ABC):
    """The order of calls, and how plans are made and committed.

    A kind supplies the methods below that start with an underscore. `WrapperCache` calls
    the `_plan_...` methods of all its children before it commits any of their plans.
    """

    def __init__(self) -> None:
        self._config = CacheConfig()
        self._ready = False
        self._closed = False
        self._layer = 0
        self._max_batch = 0

    @abstractmethod
    def _open(self, dtype: mx.Dtype | None, room: int) -> None: ...
    @abstractmethod
    def _plan_forward(self, batch: Batch) -> Plan: ...
    @abstractmethod
    def _plan_reserve(self, batch: Batch) -> Plan: ...
    @abstractmethod
    def _plan_remove(self, sequence: int, begin: int, end: int | None) -> Plan: ...
    @abstractmethod
    def _plan_copy(self, src: int, dst: int, length: int) -> Plan: ...
    @abstractmethod
    def _set_causal(self, options: CausalOptions) -> None: ...
    @abstractmethod
    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None: ...
    @abstractmethod
    def _get(self, layer: int) -> History: ...
    @abstractmethod
    def _attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array: ...
    @abstractmethod
    def _can_resume(self, sequence: int, position: int) -> bool: ...
    @abstractmethod
    def _end(self, sequence: int) -> int: ...
    @abstractmethod
    def _close(self) -> None: ...
    @abstractmethod
    def check(self) -> None:
        """Assert this cache's invariants; for tests."""

    def set_config(self, config: CacheConfig) -> None:
        """Set the form in which history is returned.

        Raises:
            CacheError: after `init`.

        """
        self._check_open()
        if self._ready:
            raise CacheError("set_config must come before init")
        self._config = config

    def init(
        self,
        dtype: mx.Dtype | None = mx.float16,
        max_sequences: int = 1,
        capacity: int = 4096,
        max_batch: int = 512,
    ) -> None:
        """Make room for `max_sequences * capacity` tokens, shared by all sequences.

        Args:
            dtype: of what is stored; None keeps that of each layer's first K and V.
            max_sequences, capacity: their product is the room in cells. Neither bounds
                the number, the names or the lengths of sequences.
            max_batch: the most tokens in one forward pass.

        Raises:
            ValueError: a number below 1, or a dtype that is no float type.
            CacheError: a second call.

        """
        self._check_open()
        if self._ready:
            raise CacheError("init was called before")
        for name, number in (
            ("max_sequences", max_sequences),
            ("capacity", capacity),
            ("max_batch", max_batch),
        ):
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        if dtype is not None and not mx.issubdtype(dtype, mx.floating):
            raise ValueError(f"dtype must be a float type, got {dtype}")
        self._max_batch = max_batch
        self._open(dtype, max_sequences * capacity)
        self._ready = True

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Take the batch's tokens into their sequences; their K and V follow by `put`.

        Args:
            reserve: check no room and change no bookkeeping. Until the next call each `put`
                allocates and evaluates its layer's whole room without storing, and `get`
                returns the worst case's shapes.

        Raises:
            ValueError: more tokens than `max_batch`, or positions that do not go on where
                their sequence ends.
            NotSupportedError: a token would look at something that is not held.
            CacheFullError: there is no room.

        """
        self._begin(batch, reserve)

    @contextmanager
    def forward(self: Self, batch: Batch) -> Iterator[Self]:
        """`start_forward`, with a way back: an exception inside takes the batch's tokens out again."""
        plan = self._begin(batch, reserve=False)
        try:
            yield self
        except BaseException:
            plan.undo()
            raise

    def set_causal(self, options: CausalOptions) -> None:
        """Let some tokens of this batch see later ones, until the next `start_forward`.

        Raises:
            ValueError: an index outside the batch.
            CacheError: no batch has been started.

        """
        self._check_ready()
        self._set_causal(options)

    def set_layer(self, layer: int) -> None:
        """Choose the model layer for `put` and `get`. Raises ValueError below 0."""
        self._check_ready()
        self._layer = self._checked_layer(layer)

    def layer(self, layer: int) -> Layer:
        """A handle on one model layer. Raises ValueError below 0."""
        return Layer(self, self._checked_layer(layer))

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the batch's keys and values, each (1, n_kv_heads, n, head_dim), in batch order.

        Raises:
            ValueError: a shape that does not fit the batch or the layer, or no float type.
            CacheError: no batch has been started.

        """
        self._put(self._layer, keys, values)

    def get(self) -> History:
        """History for this layer, the batch included: keys, values and mask.

        Keys and values are (1, n_kv_heads, S, head_dim). The mask is None (all n tokens see
        all of S), "causal" (as `mx.fast.scaled_dot_product_attention` means it), or (n, S).

        Raises:
            CacheError: before this layer's `put`.

        """
        return self._get(self._layer)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Empty `dst` and let it share the positions of `src` below `length`. Copies no K or V.

        Raises:
            ValueError: a negative number, or `src` and `dst` the same.

        """
        self._check_ready()
        _check_numbers(src=src, dst=dst, length=length)
        if src == dst:
            raise ValueError(f"cannot copy sequence {src} onto itself")
        self._plan_copy(src, dst, length).commit()

    def can_resume(self, sequence: int, position: int) -> bool:
        """Whether all that tokens from `position` on may see below it is held.

        Raises:
            ValueError: a negative number.

        """
        self._check_ready()
        _check_numbers(sequence=sequence, position=position)
        return self._can_resume(sequence, position)

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """Take out the positions [begin, end), or all from `begin` on, which never fails.

        Later tokens move down by end - begin, and their keys are re-based by the shift hook.
        An unknown sequence or an empty range is no error.

        Raises:
            ValueError: a negative number, or begin > end.
            NotSupportedError: keys would have to be re-based and there is no hook, or what
                the next token may see would not be held.
            CacheFullError: shared cells have to be copied and there is no room.

        """
        self._check_ready()
        _check_range(sequence, begin, end)
        self._plan_remove(sequence, begin, end).commit()

    def end(self, sequence: int) -> int:
        """The position after the sequence's last token; 0 if it is unknown."""
        self._check_ready()
        return self._end(sequence)

    def close(self) -> None:
        """Give all memory back. Further use is a CacheError; a second close is none."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self: Self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, batch: Batch, reserve: bool) -> Plan:
        self._check_ready()
        if len(batch) > self._max_batch:
            raise ValueError(f"a batch of {len(batch)} tokens exceeds max_batch={self._max_batch}")
        plan = self._plan_reserve(batch) if reserve else self._plan_forward(batch)
        plan.commit()
        return plan

    def _checked_layer(self, layer: int) -> int:
        if layer < 0:
            raise ValueError(f"layer must be 0 or more, got {layer}")
        return layer

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the cache is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._ready:
            raise CacheError("init must come first")


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} must be 0 or more, got {number}")


def _check_range(sequence: int, begin: int, end: int | None) -> None:
    _check_numbers(sequence=sequence, begin=begin)
    if end is not None and end < begin:
        raise ValueError(f"cannot remove [{begin}, {end}): it ends before it begins")


def slide(cache: Cache, sequence: int, keep: int = 0, discard: int | None = None) -> int:
    """Shift the context: drop tokens after the first `keep`, and re-base the rest.

    Args:
        discard: how many; None drops the older half of those after `keep`.

    Returns:
        How many tokens were dropped.

    Raises:
        ValueError: a negative number.
        NotSupportedError, CacheFullError: as `Cache.remove`.

    """
    _check_numbers(sequence=sequence, keep=keep, discard=discard or 0)
    end = cache.end(sequence)
    if discard is None:
        discard = max(0, end - keep) // 2
    stop = min(keep + discard, end)
    if stop <= keep:
        return 0
    cache.remove(sequence, keep, stop)
    return stop - keep
