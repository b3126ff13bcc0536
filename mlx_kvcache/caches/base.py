"""The order of calls, which is the same for every kind, and how plans are made and committed.

Kinds whose layers store keys and values.

Kinds that hold one immutable record for each sequence, rather than cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx

from ..arguments import whole
from ..attend.part import Attending
from ..attend.step import over
from ..batch import Batch, CacheConfig, CausalOptions
from ..errors import CacheError
from ..quantization import Quantization
from .interface import History, checked_range
from .plan import Plan

Self = TypeVar("Self", bound="PlanningCache")


class PlanningCache(ABC):
    """Sequences that batches of tokens join and leave.

    A kind supplies the methods below that start with an underscore. `WrapperCache` calls
    the `_plan_...` methods of all its children before it commits any of their plans.
    """

    def __init__(self) -> None:
        self._config = CacheConfig()
        self._ready = False
        self._closed = False
        self._layer = 0
        self._max_batch = 0
        self._block: Plan | None = None
        """The step of the `forward` that is being run."""

    @abstractmethod
    def _open(self, dtype: mx.Dtype | None, room: int, quantization: Quantization | None) -> None: ...
    @abstractmethod
    def _plan_forward(self, batch: Batch) -> Plan: ...
    @abstractmethod
    def _plan_reserve(self, batch: Batch) -> Plan: ...
    @abstractmethod
    def _plan_remove(self, sequence: int, begin: int, end: int | None) -> Plan: ...
    @abstractmethod
    def _plan_copy(self, src: int, dst: int, length: int) -> Plan: ...
    @abstractmethod
    def _snapshot(self, sequence: int) -> Any:
        """What is held of a sequence, for `_plan_restore` of a cache of the same kind."""

    @abstractmethod
    def _plan_restore(self, sequence: int, snapshot: Any) -> Plan:
        """Plan to make a sequence what a snapshot says."""

    @abstractmethod
    def _set_causal(self, options: CausalOptions) -> None: ...
    @abstractmethod
    def _can_resume(self, sequence: int, position: int) -> bool: ...
    @abstractmethod
    def _end(self, sequence: int) -> int: ...
    @abstractmethod
    def _close(self) -> None: ...
    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all arrays that are held, what is unused in them included."""

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
        quantization: Quantization | None = None,
        head_dim: int | None = None,
    ) -> None:
        """Make room for `max_sequences * capacity` tokens, shared by all sequences.

        Args:
            dtype: of keys and values as they are returned, and stored if not in fewer bits; None
                keeps that of each layer's first ones.
            max_sequences, capacity: their product is the room in cells. Neither bounds
                the number, the names or the lengths of sequences.
            max_batch: the most tokens in one forward pass.
            quantization: to store K and V in fewer bits; encoders' and recurrent kinds' stay as
                they are.
            head_dim: features of a head, where they are known; `put` checks them otherwise.

        Raises:
            ValueError: a number below 1, a dtype that is no float type, or a head_dim that the
                quantization's groups do not divide.
            CacheError: a second call.
        """
        self._check_open()
        if self._ready:
            raise CacheError("init was called before")
        max_sequences, capacity, max_batch = whole(
            1, max_sequences=max_sequences, capacity=capacity, max_batch=max_batch
        )
        if dtype is not None and not mx.issubdtype(dtype, mx.floating):
            raise ValueError(f"dtype must be a float type, got {dtype}")
        self._max_batch = max_batch
        if head_dim is not None:
            (head_dim,) = whole(1, head_dim=head_dim)
            if quantization:
                quantization.check(head_dim)
        try:
            self._open(dtype, max_sequences * capacity, quantization)
            self._ready = True
        except BaseException:
            self._unready()
            raise

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Take the batch's tokens into their sequences; what belongs to them follows by `put`.

        A batch that begins so has no end, at which anybody could see whether all layers have been put:
        in a layer that was not, later tokens attend to zeros. `forward` checks that.

        Args:
            batch: the tokens.
            reserve: check no room and change no bookkeeping. Until the next call each `put`
                allocates and evaluates its layer's whole room without storing, and `get`
                returns the worst case's shapes.

        Raises:
            ValueError: more tokens than `max_batch`, or positions that do not go on where
                their sequence ends.
            NotSupportedError: a token would look at something that is not held.
            CacheFullError: there is no room.
            CacheError: inside a `forward` of this cache.
        """
        self._planned(batch, reserve).commit()

    @contextmanager
    def forward(self: Self, batch: Batch) -> Iterator[Self]:
        """`start_forward`, with an end: an exception inside takes the batch's tokens out again.

        At the end of the block each layer of keys and values that an earlier batch put must have been put,
        and no other where the batch's sequences hold tokens: later tokens would attend to cells that nobody
        wrote. A wrapper's child that was never put is not asked. Encoders and recurrent states stay as they
        are where nothing is put. After the block `get` reads until the cache changes; `put` is refused.

        `remove` and `copy_prefix` inside the block end the batch: its tokens stay, whatever was put.

        Raises:
            ValueError, NotSupportedError, CacheFullError: as `start_forward`.
            CacheError: inside another `forward` of this cache, which stays as it is; or, at the end, a
                layer that was not put in this batch or not in earlier ones. The tokens are taken out again.
        """
        plan = self._planned(batch, reserve=False)
        try:
            try:
                self._block = plan
                plan.commit()
                yield self
                plan.finish()
            except BaseException:
                plan.undo()
                raise
        except BaseException:
            # The way back may be interrupted, too. Where it was not, nothing is left to do.
            plan.undo()
            raise
        finally:
            self._block = None

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
        self._layer = checked_layer(layer)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Empty `dst` and let it share the positions of `src` below `length`. Copies no array.

        A length beyond the end of `src` shares all of it; an unknown `src` leaves `dst` empty.

        Raises:
            ValueError: a negative number, or `src` and `dst` the same.
        """
        self._check_ready()
        src, dst, length = whole(src=src, dst=dst, length=length)
        if src == dst:
            raise ValueError(f"cannot copy sequence {src} onto itself")
        self._plan_copy(src, dst, length).commit()

    def can_resume(self, sequence: int, position: int) -> bool:
        """Whether all that tokens from `position` on may see below it is held; False beyond the end.

        Raises:
            ValueError: a negative number.
        """
        self._check_ready()
        sequence, position = whole(sequence=sequence, position=position)
        return self._can_resume(sequence, position)

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """Take out the positions [begin, end), or all from `begin` on, which K/V never refuse.

        Later tokens move down by end - begin, and their keys are re-based by the shift hook.
        A range beyond the end takes out what there is of it, and no token is no error. What is left may
        end where tokens cannot go on, as in a window that has slid: `can_resume(sequence, begin)` says so
        before and after, and the next batch would raise.

        Raises:
            ValueError: a negative number, or begin > end.
            NotSupportedError: keys would have to be re-based and there is no hook, or what
                the next token may see would not be held.
            CacheFullError: shared cells have to be copied and there is no room.
        """
        self._check_ready()
        sequence, begin, end = checked_range(sequence, begin, end)
        self._plan_remove(sequence, begin, end).commit()

    def end(self, sequence: int) -> int:
        """The position after the sequence's last token; 0 if it is unknown."""
        self._check_ready()
        return self._end(sequence)

    def close(self) -> None:
        """Give all memory back. Further use is a CacheError; a second close is none."""
        self._closed = True
        # Also a second time, in case something came between.
        self._close()

    def __enter__(self: Self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _planned(self, batch: Batch, reserve: bool) -> Plan:
        self._check_ready()
        if self._block is not None and self._block.is_under_way:
            raise CacheError(
                "a forward pass is under way, and the next would end it before all its layers are put: "
                "begin the next after the `with` block"
            )
        if len(batch) > self._max_batch:
            raise ValueError(f"a batch of {len(batch)} tokens exceeds max_batch={self._max_batch}")
        return self._plan_reserve(batch) if reserve else self._plan_forward(batch)

    def _unready(self) -> None:
        """Be as before `init`."""
        self._ready = False

    def _clipped(self, sequence: int, end: int | None) -> int:
        """The end of a range to remove, None or beyond the sequence meaning its end."""
        length = self._end(sequence)
        return length if end is None else min(end, length)

    def _no_batch(self) -> CacheError:
        """What to raise where a batch is needed and there is none."""
        self._check_ready()
        return CacheError("start_forward must come first")

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the cache is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._ready:
            raise CacheError("init must come first")


def checked_layer(layer: int) -> int:
    """The layer itself. Raises ValueError below 0."""
    (layer,) = whole(layer=layer)
    return layer


class Layer:
    """One model layer of a cache: `put` and `get` without the mode that `set_layer` sets."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: KeyValueCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def put(self, keys: mx.array, values: mx.array) -> None:
        """As `KeyValueCache.put`, for this layer."""
        self.cache._put(self.index, keys, values)

    def get(self) -> History:
        """As `KeyValueCache.get`, for this layer."""
        return self.cache._get(self.index)


class KeyValueCache(PlanningCache):
    """`put` and `get` of keys and values, on the current layer or by a handle."""

    @abstractmethod
    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None: ...
    @abstractmethod
    def _get(self, layer: int) -> History: ...
    @abstractmethod
    def _attend(self, layer: int, given: Attending) -> mx.array: ...

    def layer(self, layer: int) -> Layer:
        """A handle on one model layer. Raises ValueError below 0."""
        return Layer(self, checked_layer(layer))

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the batch's keys and values, each (1, n_kv_heads, n, head_dim), in batch order.

        Raises:
            ValueError: a shape that does not fit the batch or the layer, or no float type.
            CacheError: no batch has been started, or its `forward` is over.
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


class Stream(Protocol):
    """What is known of a sequence."""

    @property
    def end(self) -> int: ...


S = TypeVar("S", bound=Stream)


class Pass(NamedTuple):
    """A forward pass under way.

    Attributes:
        begins: for each sequence of the batch, where it ended before.
        scratch: after `start_forward(reserve=True)`, what takes the place of what is stored, by layer.
    """

    batch: Batch
    begins: Mapping[int, int]
    scratch: dict[int, Any] | None


class StreamCache(PlanningCache, Generic[S]):
    """Sequences as a dict of records; a change is a dict of new ones."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, S] = {}
        self._pass: Pass | None = None
        self._finished: Pass | None = None
        """The last pass whose `forward` is over."""

    def _open(self, dtype: mx.Dtype | None, room: int, quantization: Quantization | None) -> None:
        self._streams = {}

    def _close(self) -> None:
        self._streams = {}
        self._pass = self._finished = None

    def _plan_reserve(self, batch: Batch) -> Plan:
        return StreamPlan(self, {}, batch, reserve=True)

    def _snapshot(self, sequence: int) -> S | None:
        return self._streams.get(sequence)

    def _plan_restore(self, sequence: int, snapshot: S | None) -> Plan:
        return StreamPlan(self, {sequence: snapshot})

    def _end(self, sequence: int) -> int:
        stream = self._streams.get(sequence)
        return stream.end if stream else 0

    def _under_way(self) -> Pass:
        if self._pass is None:
            raise self._no_batch()
        return self._pass

    def _check_unfinished(self) -> None:
        """Raise CacheError where the `forward` of the last pass is over."""
        if self._pass is not None and self._pass is self._finished:
            raise over(len(self._pass.batch))


class StreamPlan(Plan, Generic[S]):
    """New records of some sequences (None forgets one), by a batch or between batches."""

    def __init__(
        self,
        cache: StreamCache[S],
        changes: Mapping[int, S | None],
        batch: Batch | None = None,
        reserve: bool = False,
    ) -> None:
        self._cache = cache
        self._changes = changes
        self._before = {sequence: cache._streams.get(sequence) for sequence in changes}
        self._last = cache._pass
        self._pass: Pass | None = None
        if batch is not None:
            begins = {sequence: cache._end(sequence) for sequence in batch.rows}
            self._pass = Pass(batch, begins, {} if reserve else None)

    def make(self) -> None:
        if self._pass is not None or self._changes:
            self._cache._pass = self._pass
            self._assign(self._changes)

    def unmake(self) -> None:
        self._assign(self._before)
        self._cache._pass = self._last

    @property
    def is_under_way(self) -> bool:
        cache = self._cache
        return self._pass is not None and cache._pass is self._pass and cache._finished is not self._pass

    def finish(self) -> None:
        if self.is_under_way:
            self._cache._finished = self._pass

    def undo(self) -> None:
        if self._pass is not None and self._cache._pass is self._pass:
            self._assign(self._before)
            self._cache._pass = None

    def _assign(self, streams: Mapping[int, S | None]) -> None:
        for sequence, stream in streams.items():
            self._cache._streams.pop(sequence, None)
            if stream is not None:
                self._cache._streams[sequence] = stream
