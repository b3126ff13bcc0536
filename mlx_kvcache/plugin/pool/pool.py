"""The pool of cells that all prompt caches of a model share.

Lock order: a thread that holds one of these locks takes only locks further down.

1. `Pool.lock`; of two sibling pools, first that of the pool in the model's precision, then that of
   the quantized one;
2. the findings of `trial.py`, while the model is tried;
3. `Pool.lock` of the trial's own pool, which no other thread knows;
4. the schemes of `probe.py`, while the model's rotations are recorded;
5. `_lock` of this module, while a pool is looked up or made.

There is one lock 2 and one lock 4 for each model. Finalizers take no locks; see `observe.py`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...batch import Batch
from ...caches.base import PlanningCache
from ...caches.causal import PositionalCache
from ...caches.plan import JointPlan, Plan
from ...caches.recurrent import Arrays, RecurrentCache
from ...errors import CacheError
from ...quantization import Codecs, Quantization
from ...storage.buffers import Form
from ..hosts.handles import serve
from ..hosts.layout import Layout, Leaf, host_of
from ..hosts.mixers import Mixers, watch
from ..hosts.observe import PerModel, observe
from ..ranks import ALONE, Ranks
from ..rope.axes import axes_of
from ..rope.probe import scheme_of
from ..rope.rebase import Scheme
from .weights import Version, version_of

Batching = Literal["ragged", "gathered", "apart"]
"""How a batch runs: each row attends to its own keys ("ragged"), all rows to a gathered copy of
their keys ("gathered"), or the model is called for each row ("apart")."""

EVALUATE = 64
"""With ranks, only one in this many calls of `Pool.compute` evaluates arrays."""


class User(Protocol):
    """A user of a pool, which can have a forward in progress."""

    interrupted: bool

    @property
    def unfinished(self) -> bool: ...

    def abandon(self) -> None: ...


class Checkpoints(NamedTuple):
    """How many older states of recurrent layers a pool keeps.

    Attributes:
        most: the maximum number for each conversation.
        nbytes: the maximum number of bytes for all conversations of the pool; None for no limit.
    """

    most: int = 16
    nbytes: int | None = 1 << 30


class Pool:
    """Holds one cache for each kind of layer. Each prompt cache is a sequence in it; forks share cells.

    A pool has no size limit; each prompt cache has its own `capacity`. Calls of the model and edits
    hold `lock`, so those of several threads run one after the other. A pool does not keep its model
    alive.

    MLX computes an array only in the thread that made it, and two threads must not wait for the same
    array. Therefore, when `lock` is free, the evaluation of all arrays of the pool has been started.
    Once several live threads have used the pool, it has also finished.

    Attributes:
        architecture: the module of the model's class.
        host: the library that the model comes from.
        axes: how the model takes positions on several axes; None if it does not.
        keeps_positions: whether the model keeps positions of a conversation on its module.
        caches: one for each of the layout's rules.
        rewind: the number of newest tokens that recurrent layers can drop, whichever they are.
        kinds: for each leaf of the layout, the index of its cache.
        quantization: the bit widths of stored keys and values, by leaf; None for the model's precision.
        ranks: the processes that run the model together.
        version: the version of the model's weights that all keys, values and states come from.
        forms: for each leaf that the model writes, the form of its keys and values; None for
            recurrent states.
        mirrored: the leaves whose values the model replaces by arrays shaped like their keys.
        ask: answers a question about the model, such as "batching", by running it.
        text: the tokens on which the centers of the quantization were measured.
        is_shared: whether several live threads have used the pool.
        is_scratch: whether written arrays are discarded without being computed.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        rewinds: Sequence[int],
        quantization: Quantization | None = None,
        ranks: Ranks = ALONE,
        version: Version | None = None,
        checkpoints: Checkpoints = Checkpoints(),  # noqa: B008  # immutable
    ) -> None:
        self._model = weakref.ref(model)
        self.architecture = type(model).__module__
        self.host = host_of(model)
        self.axes = axes_of(model)
        self.keeps_positions = self.axes is not None or hasattr(model, "_position_ids")
        self.version = version or version_of(model)
        self.ranks = ranks
        self.layout = layout
        self.rewinds = tuple(rewinds)
        self.checkpoints = checkpoints
        self.quantization = quantization
        self.leaves = layout.leaves
        self.caches = tuple(
            RecurrentCache(
                max(rewind, 64),
                checkpoints.most,
                replay=self._replay,
                rewind=rewind,
                budget=checkpoints.nbytes,
            )
            if rule is None
            else PositionalCache(rule, rewind, None)
            for rule, rewind in zip(layout.rules, rewinds, strict=True)
        )
        for cache in self.caches:
            cache.init(None, capacity=sys.maxsize, max_batch=sys.maxsize, quantization=quantization)
        for _, cache in self.positional():
            cache.compute = _computing(weakref.ref(self))
        self.kinds = tuple(layout.rules.index(leaf.rule) for leaf in self.leaves)
        self.rewind = dict(zip(layout.rules, rewinds, strict=True)).get(None, 0)
        self.lock = threading.RLock()
        self.forms: dict[int, Form | None] = dict.fromkeys(range(len(self.leaves)))
        self.mirrored: set[int] = set()
        self.ask: Callable[..., Any] = lambda pool, question: None
        self.text: tuple[int, ...] = ()
        self._names = count()
        self._dropped: deque[int] = deque()
        self._user: weakref.ref[User] | None = None
        self._thread: weakref.ref[threading.Thread] | None = None
        self.is_shared = False
        self.is_scratch = False
        self._computed = count(1)
        weakref.finalize(self, observe(model))
        weakref.finalize(self, serve(model))

    @property
    def model(self) -> nn.Module | None:
        """The model, or None if it has been freed: prompt caches do not keep it alive."""
        return self._model()

    @property
    def living_model(self) -> nn.Module:
        """The model. Raises CacheError if it has been freed."""
        model = self._model()
        if model is None:
            raise CacheError(
                f"the model of this prompt cache ({self.architecture}) has been freed: a cache does not keep "
                "its model alive, so keep a reference to the model while you use the cache"
            )
        return model

    @property
    def nbytes(self) -> int:
        """Allocated bytes. Bytes that several prompt caches share count once."""
        with self.lock:
            self._sweep_between_forwards()
            return sum(cache.nbytes for cache in self.caches)

    @property
    def scheme(self) -> Scheme:
        """How the model encodes positions. The first access runs the model on a few tokens."""
        return scheme_of(self.living_model, self.ranks)

    @cached_property
    def batching(self) -> Batching:
        """How to run a batch so that each row gets the logits that it gets alone."""
        batching: Batching = self.ask(self, "batching")
        return batching

    @cached_property
    def mixes(self) -> bool:
        """Whether one input may have single tokens of any sequences as its rows."""
        return bool(self.ask(self, "mixes"))

    @cached_property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers, on this rank or on another.

        Ranks of a pipeline have different layers, but refuse the same edits and run the same trials.
        """
        return self.layout.is_recurrent if self.ranks.is_alone else bool(self.ask(self, "has_states"))

    @property
    def can_move_states(self) -> bool:
        """Whether recurrent states are known not to contain the positions of tokens."""
        if not self.has_states or not self.ranks.is_alone:
            return not self.has_states
        return bool(self.mixers) and not any(own.uses_offset for own in self.mixers.values())

    @cached_property
    def mixers(self) -> dict[int, Mixers]:
        """The modules that compute the recurrent layers' states, by leaf.

        Empty if there are none, or if calling them again does not give the same states: then a conversation
        can go back to checkpoints only.
        """
        if not self.has_states:
            return {}
        found: dict[int, Mixers] = self.ask(self, "mixers")
        return {} if self.ask(self, "refusal") else self.watch_mixers(found)

    def watch_mixers(self, found: dict[int, Mixers]) -> dict[int, Mixers]:
        modules = [module for own in found.values() for mixer in own.modules if (module := mixer.module())]
        weakref.finalize(self, watch(self.living_model, modules))
        return found

    def _replay(self, leaf: int, arrays: Arrays, inputs: tuple[mx.array, ...]) -> Arrays:
        return self.mixers[leaf].replay(arrays, inputs)

    @property
    def buffers(self) -> list[mx.array]:
        """All arrays of keys and values."""
        return [array for _, cache in self.positional() for array in cache._store.arrays]

    def compute(self, arrays: Iterable[mx.array]) -> None:
        """Evaluate arrays that this thread has made, before another thread can see them."""
        if self.is_scratch:
            return
        if not self.ranks.is_alone and next(self._computed) % EVALUATE:
            # With ranks, evaluation is left to the caller: here it could wait for another rank.
            return
        evaluate: Callable[..., None] = mx.eval if self.is_shared else mx.async_eval
        evaluate(list(arrays))

    def compute_forward(self, arrays: Iterable[mx.array]) -> None:
        """Evaluate arrays that a forward has written.

        An error is raised only if several threads use the pool. Otherwise it is left to whoever evaluates the
        model's output, as without a cache of this package.
        """
        try:
            self.compute(arrays)
        except RuntimeError:
            if self.is_shared:
                raise

    def codecs(self, leaf: Leaf) -> Codecs:
        """Return the quantization of a leaf's keys and of its values; None for the model's precision."""
        return self.quantization.of(leaf.index) if self.quantization else (None, None)

    def sibling(self, quantization: Quantization | None) -> Pool:
        """Return the model's pool with another quantization.

        Raises:
            ValueError: a head size is not a multiple of the group size.
        """
        for leaf in self.leaves:
            form = self.forms.get(leaf.index)
            if form and quantization:
                form.packed_by(quantization.of(leaf.index), f"layer {leaf.name}")
        model = self.living_model
        pool = pool_for(
            model, self.layout, self.rewinds, quantization, self.ranks, self.version, self.checkpoints
        )
        pool.forms, pool.mirrored, pool.ask = self.forms, self.mirrored, self.ask
        return pool

    def keyed(self, leaf: Leaf) -> PositionalCache:
        """Return the cache of a leaf of keys and values."""
        cache = self.caches[self.kinds[leaf.index]]
        assert isinstance(cache, PositionalCache)
        return cache

    @cached_property
    def recurrent(self) -> RecurrentCache:
        """The cache of all recurrent layers. Only for models that have some."""
        return next(cache for cache in self.caches if isinstance(cache, RecurrentCache))

    def positional(self) -> Iterator[tuple[int, PositionalCache]]:
        """Yield the caches of keys and values with their indices."""
        for index, cache in enumerate(self.caches):
            if isinstance(cache, PositionalCache):
                yield index, cache

    def new_sequence(self) -> int:
        return next(self._names)

    def drop(self, sequence: int) -> None:
        """Mark a sequence for release by the next sweep. Safe in finalizers: it takes no lock."""
        self._dropped.append(sequence)

    def free_dropped(self) -> None:
        """Release dropped sequences, unless a forward is in progress: then its end releases them."""
        with self.lock:
            self._sweep_between_forwards()

    def take_turn(self, user: User) -> None:
        """Let `user` change the caches. Undoes an unfinished forward of another user first."""
        last = self._user and self._user()
        if last is not user:
            if last and last.unfinished:
                last.abandon()
                last.interrupted = True
            self._user = weakref.ref(user)
        self._note_thread()
        self._sweep()

    def goes_on(self, user: User) -> bool:
        """Whether `user` took the last turn and nothing waits for release: then it need not take another."""
        if self._dropped or self._user is None or self._user() is not user:
            return False
        self._note_thread()
        return True

    def _note_thread(self) -> None:
        """Detect a second live thread that uses the pool."""
        current, last = threading.current_thread(), self._thread and self._thread()
        if last is current:
            return
        if last and last.is_alive() and not self.is_shared:
            self.is_shared = True
            # Arrays that another thread is still loading from a file cannot be evaluated here.
            with suppress(RuntimeError):
                self.compute_all()
        self._thread = weakref.ref(current)

    def compute_all(self) -> None:
        """Evaluate all arrays of the pool."""
        states = self.recurrent.arrays() if self.layout.is_recurrent else []
        self.compute([*self.buffers, *states])

    def commit(self, plan: Plan) -> None:
        """Apply an edit once all ranks are ready for it."""
        self.ranks.ready()
        self.apply(plan)

    def apply(self, plan: Plan) -> None:
        """Apply an edit that the ranks have agreed on."""
        self.compute(plan.arrays())
        plan.commit()

    def plan_forward(self, batch: Batch | None) -> Plan:
        """Plan to add a batch's tokens to all caches. Raises the errors of `start_forward`."""
        plans = [cache._plan_forward(batch) for cache in self.caches] if batch else []
        return plans[0] if len(plans) == 1 else JointPlan(plans)

    def wants_handles(self, sequence: int) -> bool:
        """Whether handles avoid a copy: the sequence is quantized or stored in several spans."""
        spans = (cache._table[sequence].spans for _, cache in self.positional())
        return self.quantization is not None or any(len(own) > 1 for own in spans)

    def end(self, sequence: int) -> int:
        return self.caches[0]._end(sequence)

    def plan_truncate(self, sequence: int, position: int) -> list[Plan]:
        """Plan to drop the tokens from `position` on. Raises NotSupportedError if it cannot."""
        return [cache._plan_remove(sequence, position, None) for cache in self.caches]

    def copy(self, src: int, dst: int) -> None:
        """Make `dst` share all tokens of `src`."""
        self.commit(JointPlan([cache._plan_copy(src, dst, self.end(src)) for cache in self.caches]))

    def mark(self, sequence: int, position: int) -> bool:
        """Mark a position as worth a checkpoint; see `RecurrentCache.mark`."""
        return not self.layout.is_recurrent or self.recurrent.mark(sequence, position)

    def restore(self, sequence: int, snapshots: Sequence[Any]) -> None:
        """Restore a sequence from snapshots, one for each cache, without evaluating their arrays.

        Raises:
            ValueError: a snapshot's heads have another shape than those of the pool.
        """
        pairs = zip(self.caches, snapshots, strict=True)
        self.ranks.ready()
        JointPlan([cache._plan_restore(sequence, snapshot) for cache, snapshot in pairs]).commit()

    def can_resume(self, sequence: int, position: int) -> bool:
        return all(cache._can_resume(sequence, position) for cache in self.caches)

    def resume_point(self, sequence: int, position: int) -> int:
        """Return the newest position <= `position` that all caches can resume from."""
        point = min(position, self.end(sequence))
        while not self.can_resume(sequence, point):
            point = min(_resume_point(cache, sequence, point) for cache in self.caches)
        return point

    def _sweep_between_forwards(self) -> None:
        user = self._user and self._user()
        if not (user and user.unfinished):
            self._sweep()

    def _sweep(self) -> None:
        while self._dropped:
            JointPlan(self.plan_truncate(self._dropped[0], 0)).commit()
            self._dropped.popleft()
            for cache in self.caches:
                # The model may get another dtype before it writes again.
                if isinstance(cache, PositionalCache) and not cache._table.sequences:
                    cache._store.layers.clear()
                elif isinstance(cache, RecurrentCache) and not cache._streams:
                    cache._forms.clear()
                    cache._counts.clear()


def _computing(pool: weakref.ref[Pool]) -> Callable[[list[mx.array]], None]:
    """`Pool.compute` as a function that does not keep the pool alive."""

    def compute(arrays: list[mx.array]) -> None:
        if (own := pool()) is not None:
            own.compute(arrays)

    return compute


def _resume_point(cache: PlanningCache, sequence: int, position: int) -> int:
    """Return the newest position <= `position` that one cache can resume from."""
    if isinstance(cache, RecurrentCache):
        return cache.prepare_restore(sequence, position) or 0
    assert isinstance(cache, PositionalCache)
    rule = cache._rule
    # If the tokens visible from a position are not held, neither are those visible from just before.
    # Exceptions are the start of a chunk, which sees nothing, and the sinks, which see only each other.
    candidates = (position, max(0, rule.lower(position)), min(position, rule.sinks))
    return next((p for p in candidates if cache._can_resume(sequence, p)), 0)


_pools: PerModel[weakref.WeakValueDictionary[tuple[object, ...], Pool]] = PerModel(
    weakref.WeakValueDictionary
)
_lock = threading.RLock()


def pool_for(
    model: nn.Module,
    layout: Layout,
    rewinds: Sequence[int],
    quantization: Quantization | None,
    ranks: Ranks,
    version: Version | None = None,
    checkpoints: Checkpoints = Checkpoints(),  # noqa: B008  # immutable
) -> Pool:
    """Return the model's pool for these options, and make it if there is none.

    Prompt caches with the same options share a pool and can join one batch. After the model's weights
    have changed, new caches get another pool.
    """
    version = version or version_of(model)
    # A pool keeps its version alive, so the id is unique.
    key = id(version), layout, tuple(rewinds), quantization, ranks, checkpoints
    pools = _pools.of(model)
    with _lock:
        pool = pools.get(key)
        if pool is None:
            pool = pools[key] = Pool(model, layout, rewinds, quantization, ranks, version, checkpoints)
        return pool
