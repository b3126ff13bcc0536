"""Base classes for kinds of cache.

`PlanningCache` implements the public methods of `Cache`. It checks arguments and the order of calls, asks
the kind for a `Plan` and commits it. A kind implements the methods that begin with an underscore:

- `KeyValueCache`: kinds whose layers store keys and values.
- `StreamCache`: kinds that hold one immutable record for each sequence, rather than cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx

from ..arguments import class_of, whole
from ..attend.part import Attending
from ..attend.step import over
from ..batch import Batch, CacheConfig, CausalOptions
from ..errors import CacheError, NotSupportedError
from ..quantization import Quantization
from .interface import History, Recurrent, checked_recurrent
from .plan import Plan

Self = TypeVar("Self", bound="PlanningCache")


class PlanningCache(ABC):
    """Implements the public methods of `Cache` on a kind's abstract methods.

    A `_plan_...` method computes a change and raises if it is impossible. It must not change any sequence:
    the plan's `make` does. So `WrapperCache` can plan a change of all its children before it makes any.
    """

    def __init__(self) -> None:
        self._config = CacheConfig()
        self._ready = self._closed = False
        self._layer = self._max_batch = 0
        self._block: Plan | None = None
        """The plan of the `forward` block under way."""

    @abstractmethod
    def _open(self, dtype: mx.Dtype | None, room: int, quantization: Quantization | None) -> None:
        """Prepare the storage for `room` tokens."""

    @abstractmethod
    def _plan_forward(self, batch: Batch) -> Plan:
        """Plan to add a batch's tokens. Raises ValueError unless each sequence continues at its end."""

    @abstractmethod
    def _plan_reserve(self, batch: Batch) -> Plan:
        """Plan a trial of the worst case, which adds no tokens."""

    @abstractmethod
    def _plan_remove(
        self, sequence: int, begin: int, end: int | None, recurrent: Recurrent = "refuse"
    ) -> Plan:
        """Plan to remove [begin, end), which may reach beyond the sequence's end; None is its end.

        Kinds without recurrent states ignore `recurrent`.
        """

    @abstractmethod
    def _plan_copy(self, src: int, dst: int, length: int) -> Plan:
        """Plan to replace `dst` by at most `length` first tokens of `src`."""

    def _plan_graft(self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent) -> Plan:
        """Plan a `graft`. The range lies inside the source, which is another sequence."""
        raise NotSupportedError(f"a {class_of(self)} cannot append tokens of another sequence")

    @abstractmethod
    def _snapshot(self, sequence: int) -> Any:
        """Return a sequence's contents, for `_plan_restore` of a cache of the same kind."""

    @abstractmethod
    def _plan_restore(self, sequence: int, snapshot: Any) -> Plan:
        """Plan to replace a sequence by a snapshot."""

    @abstractmethod
    def _set_causal(self, options: CausalOptions) -> None: ...
    @abstractmethod
    def _can_resume(self, sequence: int, position: int) -> bool: ...
    @abstractmethod
    def _end(self, sequence: int) -> int: ...
    @abstractmethod
    def _close(self) -> None:
        """Release all memory. May be called again after an interrupted call."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of all arrays, unused cells included."""

    @abstractmethod
    def check(self) -> None:
        """Assert this cache's invariants; for tests."""

    def set_config(self, config: CacheConfig) -> None:
        """Choose the form of the mask and the padding that `get` returns.

        Raises:
            CacheError: `init` was called before.
        """
        self._check_open()
        if self._ready:
            raise CacheError("cannot call set_config after init: set_config must come before init")
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
            dtype: the dtype in which `get` returns keys and values, and in which they are stored unless
                quantized. None takes the dtype of each layer's first `put`. Encoder and recurrent caches
                keep the dtype of what is put.
            max_sequences: a factor of the room; it does not bound the number of sequences.
            capacity: the other factor; it does not bound the length of a sequence.
            max_batch: the most tokens in one forward pass.
            quantization: the bit widths of stored keys and values. Encoder and recurrent caches ignore it.
            head_dim: the features of a head. If it is given, `init` checks that `quantization` fits it;
                otherwise `put` does.

        Raises:
            ValueError: a number is below 1, the dtype is not a float type, or `head_dim` is not a multiple
                of the quantization's group size.
            CacheError: `init` was called before.
        """
        self._check_open()
        if self._ready:
            raise CacheError("init was called before: make a new cache for other sizes")
        max_sequences, capacity, max_batch = whole(
            1, max_sequences=max_sequences, capacity=capacity, max_batch=max_batch
        )
        if dtype is not None and not mx.issubdtype(dtype, mx.floating):
            raise ValueError(f"dtype must be a float type, got {dtype}")
        if head_dim is not None:
            (head_dim,) = whole(1, head_dim=head_dim)
            if quantization:
                quantization.check(head_dim)
        self._max_batch = max_batch
        try:
            self._open(dtype, max_sequences * capacity, quantization)
            self._ready = True
        except BaseException:
            self._unready()
            raise

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Begin a forward pass: add the batch's tokens to their sequences.

        The model then calls `put` and `get` for each layer. Nothing checks that it puts every layer, as
        `forward` does; in a layer that it leaves out later tokens attend to zeros.

        Args:
            batch: the new tokens. Each sequence continues at its `end`.
            reserve: try the worst case before the first request. No tokens are added and no room is
                checked. Until the next forward pass or edit, `put` allocates and evaluates its layer's
                whole room but stores nothing, and `get` returns arrays of the largest shapes.

        Raises:
            ValueError: the batch has more than `max_batch` tokens, or a sequence's positions do not
                continue at its end.
            NotSupportedError: a token would see something that the cache no longer holds; see `can_resume`.
            CacheFullError: there is no room for the batch.
            CacheError: a `forward` block of this cache is under way.
        """
        self._planned(batch, reserve).commit()

    @contextmanager
    def forward(self: Self, batch: Batch) -> Iterator[Self]:
        """Run a forward pass in a `with` block: `start_forward`, and a check at the end.

        If the block raises, the batch's tokens are removed again. The layers of keys and values that it puts
        must be the same as in earlier batches, because later tokens would attend to cells without keys and
        values. A new layer is allowed if the batch's sequences held no tokens, and a wrapper's child that has
        never been put is not checked. Encoder outputs and recurrent states stay if nothing is put.

        After the block, `get` still works until the cache changes; `put` raises CacheError. A `remove` or
        `copy_prefix` that changes the cache inside the block ends the pass: its tokens stay, unchecked.

        Yields:
            This cache.

        Raises:
            ValueError, NotSupportedError, CacheFullError: as `start_forward`.
            CacheError: another `forward` block of this cache is under way; that pass stays as it is. Or, at
                the end, the layers put differ from those of earlier batches; the tokens are removed again.
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
            # The first undo() may have been interrupted; undoing twice is harmless.
            plan.undo()
            raise
        finally:
            self._block = None

    def set_causal(self, options: CausalOptions) -> None:
        """Let some tokens of the current batch see later ones, until the next `start_forward`.

        Raises:
            ValueError: an index is outside the batch.
            CacheError: no forward pass has begun.
            NotSupportedError: a recurrent cache has no mask.
        """
        self._check_ready()
        self._set_causal(options)

    def set_layer(self, layer: int) -> None:
        """Choose the model layer for `put` and `get`. Raises ValueError if it is negative."""
        self._check_ready()
        self._layer = checked_layer(layer)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Replace sequence `dst` by the first `length` tokens of `src`, for instance to branch.

        No array is copied: both sequences share the stored tokens, and each then grows on its own. If
        `length` is beyond the end of `src`, `dst` shares all of it; if `src` is unknown, `dst` becomes empty.
        A sliding window may no longer hold what the next token of `dst` sees, and a recurrent cache may have
        no state there: ask `can_resume(src, length)` first.

        Args:
            src: the sequence to share, which does not change.
            dst: the sequence to replace.
            length: the number of tokens to share.

        Raises:
            ValueError: a number is negative, or `src` and `dst` are the same.
        """
        self._check_ready()
        src, dst, length = whole(src=src, dst=dst, length=length)
        if src == dst:
            raise ValueError(f"cannot copy sequence {src} onto itself")
        self._plan_copy(src, dst, length).commit()

    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether the next forward pass may continue the sequence at `position`.

        It may if the cache still holds everything below `position` that tokens from there on can see; not
        beyond the sequence's end, except in an encoder cache, which always may. To continue at a `position`
        before the end, first call `remove(sequence, position)`.

        Raises:
            ValueError: a number is negative.
        """
        self._check_ready()
        sequence, position = whole(sequence=sequence, position=position)
        return self._can_resume(sequence, position)

    def remove(
        self, sequence: int, begin: int, end: int | None = None, recurrent: Recurrent = "refuse"
    ) -> None:
        """Remove the tokens at positions [begin, end), or all from `begin` on if `end` is None.

        With `end`, later tokens move down by `end - begin` positions, and the shift hook re-bases their keys
        (see `rope_shift`). A range that reaches beyond the sequence's end is cut there, and an empty range
        changes nothing.

        Without `end`, a cache of keys and values never refuses. But the next forward pass may then raise,
        for instance where a sliding window has dropped what its tokens see. Ask
        `can_resume(sequence, begin)` before.

        Args:
            sequence: the sequence to shorten.
            begin: the first position to remove.
            end: the position after the last one to remove, or None.
            recurrent: what happens to recurrent states after removed tokens, which contain these. "refuse"
                raises. "keep" goes on with the states as they are. "replay" computes the newest state again
                from the state at `begin` and the inputs of the later tokens, as if the removed ones had never
                been read; a `RecurrentCache` with `replay` can do so for its newest tokens.

        Raises:
            ValueError: a number is negative, `begin` > `end`, or `recurrent` is none of its values.
            NotSupportedError: later keys need re-basing and the cache has no shift hook; the next token
                would see something that the cache no longer holds; or a recurrent cache is asked to remove
                tokens from the middle and does not hold what `recurrent` needs, or has no state at `begin`.
            CacheFullError: shared cells have to be copied and there is no room.
        """
        self._check_ready()
        sequence, begin = whole(sequence=sequence, begin=begin)
        if end is not None:
            (end,) = whole(end=end)
            if end < begin:
                raise ValueError(f"cannot remove [{begin}, {end}): end must be at least begin")
        self._plan_remove(sequence, begin, end, checked_recurrent(recurrent)).commit()

    def graft(
        self, source: int, begin: int, end: int, sequence: int, recurrent: Recurrent = "refuse"
    ) -> None:
        """Append the tokens [begin, end) of one sequence to another, whose next positions they get.

        With `copy_prefix` and forward passes in between, this makes a sequence of parts of others. If the
        positions change, the tokens are copied and the shift hook re-bases their keys once from what
        is stored; otherwise both sequences share them. Keys and values stay as they were computed, after the
        tokens that came before them in `source`. A range that reaches beyond the source's end is cut there.

        Args:
            source: the sequence that has the tokens. It does not change.
            begin, end: the first position to take, and the one after the last.
            sequence: the sequence to append to.
            recurrent: what happens to recurrent states, which cannot be joined. "refuse" raises. "keep" goes
                on with the source's state at `end`, which knows all that the source read up to there.

        Raises:
            ValueError: a number is negative, `begin` > `end`, `source` and `sequence` are the same, or
                `recurrent` is neither "refuse" nor "keep".
            NotSupportedError: keys need re-basing and the cache has no shift hook; the next token would see
                something that is not held; or a recurrent cache is to refuse or has no state at `end`.
            CacheFullError: there is no room for the copies.
        """
        self._check_ready()
        source, begin, end, sequence = whole(source=source, begin=begin, end=end, sequence=sequence)
        if source == sequence:
            raise ValueError(f"cannot append tokens of sequence {source} to itself: copy it first")
        if end < begin:
            raise ValueError(f"cannot append [{begin}, {end}): end must be at least begin")
        if checked_recurrent(recurrent) == "replay":
            raise ValueError('recurrent must be "refuse" or "keep" to append tokens, got "replay"')
        end = min(end, self._end(source))
        if begin < end:
            self._plan_graft(source, begin, end, sequence, recurrent).commit()

    def end(self, sequence: int) -> int:
        """Return the length of the sequence in tokens, which is its next token's position; 0 if unknown."""
        self._check_ready()
        return self._end(sequence)

    def close(self) -> None:
        """Release all memory. Later calls raise CacheError; closing again is harmless."""
        self._closed = True
        # A second call repeats this because the first may have been interrupted.
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
                "cannot begin a forward pass: a forward pass is under way and may still put layers; "
                "begin the next after its with block"
            )
        if len(batch) > self._max_batch:
            raise ValueError(
                f"a batch of {len(batch)} tokens exceeds max_batch={self._max_batch}: split it, or call init "
                "with a larger max_batch"
            )
        return self._plan_reserve(batch) if reserve else self._plan_forward(batch)

    def _unready(self) -> None:
        """Return to the state before `init`."""
        self._ready = False

    def _clipped(self, sequence: int, end: int | None) -> int:
        """Cut the end of a range at the sequence's end, which None stands for."""
        length = self._end(sequence)
        return length if end is None else min(end, length)

    def _no_batch(self) -> CacheError:
        """The error of a call that needs a forward pass under way."""
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
    """Return the layer as an int. Raises ValueError if it is negative."""
    (layer,) = whole(layer=layer)
    return layer


class Layer:
    """A handle on one model layer of a cache: `put` and `get` without `set_layer`."""

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
    """Base of the caches that store keys and values: `put` and `get` on the current layer or by a handle."""

    @abstractmethod
    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None: ...
    @abstractmethod
    def _get(self, layer: int) -> History: ...
    @abstractmethod
    def _attend(self, layer: int, given: Attending) -> mx.array: ...

    def layer(self, layer: int) -> Layer:
        """Return a handle on one model layer. Raises ValueError if it is negative."""
        return Layer(self, checked_layer(layer))

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the keys and values of the batch's n tokens for the current layer.

        Args:
            keys: (1, n_kv_heads, n, head_dim) in batch order, as attention needs them: after RoPE.
            values: (1, n_kv_heads, n, value_dim) in batch order.

        Raises:
            ValueError: a shape does not fit the batch or the layer, or a dtype is not a float type.
            CacheError: no forward pass has begun, or its `forward` block is over.
        """
        self._put(self._layer, keys, values)

    def get(self) -> History:
        """Return the current layer's keys, values and mask, the batch's own tokens included.

        Returns:
            Keys (1, n_kv_heads, S, head_dim) and values (1, n_kv_heads, S, value_dim): the histories of the
            batch's sequences, one after the other. The mask is None if all n tokens see all S keys, "causal"
            as `mx.fast.scaled_dot_product_attention` defines it, or an array (n, S) that is True where a
            token sees a key; `CacheConfig` can choose additive masks instead.

        Raises:
            CacheError: the layer has had no `put` in this forward pass.
        """
        return self._get(self._layer)


class Stream(Protocol):
    """A sequence's record, of which only the length is known here."""

    @property
    def end(self) -> int: ...


S = TypeVar("S", bound=Stream)


class Pass(NamedTuple):
    """A forward pass of a `StreamCache`.

    Attributes:
        batch: its tokens.
        begins: for each sequence of the batch, its length before.
        scratch: after `start_forward(reserve=True)`, the arrays put so far, by layer; None otherwise.
    """

    batch: Batch
    begins: Mapping[int, int]
    scratch: dict[int, Any] | None


class StreamCache(PlanningCache, Generic[S]):
    """Base of the caches that hold an immutable record for each sequence.

    A kind's `_plan_...` methods compute new records and return them in a `StreamPlan`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, S] = {}
        self._pass: Pass | None = None
        self._finished: Pass | None = None
        """The last pass whose `forward` block has ended."""

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
        """Raise CacheError if the `forward` block of the last pass has ended."""
        if self._pass is not None and self._pass is self._finished:
            raise over(len(self._pass.batch))


class StreamPlan(Plan, Generic[S]):
    """Replaces the records of some sequences; None deletes one. With `batch`, it begins a forward pass."""

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
