"""The cells that prompt caches of one model share.

Locks are taken in this order; a thread that holds one takes only those below it:

1. `Pool.lock`, of a pool in the model's precision before that of its sibling in fewer bits;
2. what is known of a model in `trial.py`, while the model is tried;
3. `Pool.lock` of the trial's own pool, which no other thread knows;
4. what is known of a model in `probe.py`, while the model is watched;
5. `_lock` here, while a pool is looked up or made.

The second and fourth are of one model each. Finalizers take none; see `lifetimes.py`.
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
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...batch import Batch
from ...caches.base import PlanningCache
from ...caches.causal import PositionalCache
from ...caches.plan import JointPlan, Plan
from ...caches.recurrent import RecurrentCache, arrays_in
from ...errors import CacheError
from ...quantization import Codecs, Quantization
from ...storage.buffers import Form
from ..hosts.handles import serve
from ..hosts.layout import Layout, Leaf
from ..hosts.lifetimes import PerModel
from ..hosts.observe import observe
from ..ranks import ALONE, Ranks
from ..rope.probe import scheme_of
from ..rope.rebase import Scheme
from .weights import Version, version_of

Batching = Literal["ragged", "gathered", "apart"]
"""Rows attend each to its own history; to one that is gathered for all; or go through alone."""


EVALUATE = 64
"""Forwards of ranks between computations of what they wrote and nobody may read."""


class User(Protocol):
    """Who can have a forward under way in a pool."""

    interrupted: bool

    @property
    def unfinished(self) -> bool: ...

    def abandon(self) -> None: ...


class Pool:
    """One cache for each kind of layer, whose sequences are prompt caches: forks share cells.

    A pool has no bound of its own; each prompt cache has its `capacity`. The model's calls and edits
    hold `lock`, so that those of several threads come one after the other.

    MLX computes an array only in the thread that made it, and two threads must not wait for the same
    one. So whenever `lock` is free, what the pool holds is being computed, or, once several threads
    that are alive have used the pool, has been computed. A pool does
    not keep its model alive.

    Attributes:
        architecture: the module of the model's class.
        caches: one for each of the layout's rules.
        kinds: for each leaf of the layout, the index of its cache.
        quantization: how keys and values are stored, by leaf; None for the model's own precision.
        ranks: the processes that run the model together.
        version: of the model's weights, those that all caches of the pool are computed with.
        forms: what the model writes, by leaf: the form of keys and values, None for arrays.
        mirrored: leaves whose values the model replaces by arrays like their keys.
        ask: finds out by trying what the model can do; `batching` and `mixes` are asked.
        is_scratch: what is written is thrown away without being computed.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        rewinds: Sequence[int],
        quantization: Quantization | None = None,
        ranks: Ranks = ALONE,
        version: Version | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self.architecture = type(model).__module__
        self.version = version or version_of(model)
        self.ranks = ranks
        self.layout = layout
        self.rewinds = tuple(rewinds)
        self.quantization = quantization
        self.leaves = layout.leaves
        self.caches = tuple(
            RecurrentCache() if rule is None else PositionalCache(rule, rewind, None)
            for rule, rewind in zip(layout.rules, rewinds, strict=True)
        )
        for cache in self.caches:
            cache.init(None, capacity=sys.maxsize, max_batch=sys.maxsize, quantization=quantization)
        self.kinds = tuple(layout.rules.index(leaf.rule) for leaf in self.leaves)
        self.lock = threading.RLock()
        self.forms: dict[int, Form | None] = dict.fromkeys(range(len(self.leaves)))
        self.mirrored: set[int] = set()
        self.ask: Callable[[Pool, str], Any] = lambda pool, question: None
        self._names = count()
        self._dropped: deque[int] = deque()
        self._user: weakref.ref[User] | None = None
        self._thread: weakref.ref[threading.Thread] | None = None
        self._is_shared = False
        self.is_scratch = False
        self._computed = count(1)
        weakref.finalize(self, observe(model))
        weakref.finalize(self, serve(model))

    @property
    def model(self) -> nn.Module | None:
        """The model, or None if it is gone: its prompt caches do not keep it alive."""
        return self._model()

    @property
    def living_model(self) -> nn.Module:
        """The model. Raises CacheError if it is gone."""
        model = self._model()
        if model is None:
            raise CacheError(
                f"the model of this prompt cache is gone, a {self.architecture}: a cache does not keep its "
                "model alive, so hold the model as long as you use the cache"
            )
        return model

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, counted once however many prompt caches share them."""
        with self.lock:
            self._sweep_between_forwards()
            return sum(cache.nbytes for cache in self.caches)

    @property
    def scheme(self) -> Scheme:
        """How the model tells positions apart; the first call runs the model on a few tokens."""
        return scheme_of(self.living_model, self.ranks)

    @cached_property
    def batching(self) -> Batching:
        """How the model computes the rows of a batch as it computes each alone."""
        batching: Batching = self.ask(self, "batching")
        return batching

    @cached_property
    def mixes(self) -> bool:
        """Whether the model computes tokens of any sequences as rows of one input."""
        return bool(self.ask(self, "mixes"))

    @property
    def buffers(self) -> list[mx.array]:
        """All arrays of keys and values."""
        return [array for _, cache in self.positional() for array in cache._store.arrays]

    def compute(self, arrays: Iterable[mx.array]) -> None:
        """Have what has just been made computed, before another thread can see it."""
        if self.is_scratch:
            return
        if not self.ranks.is_alone and next(self._computed) % EVALUATE:
            # Ranks leave it to their callers, or they would wait for each other here.
            return
        evaluate: Callable[..., None] = mx.eval if self._is_shared else mx.async_eval
        evaluate(list(arrays))

    def codecs(self, leaf: Leaf) -> Codecs:
        """In how many bits a leaf's keys and values are stored."""
        return self.quantization.of(leaf.index) if self.quantization else (None, None)

    def sibling(self, quantization: Quantization | None) -> Pool:
        """A pool like this that stores otherwise. Raises ValueError for heads that groups do not divide."""
        for leaf in self.leaves:
            form = self.forms.get(leaf.index)
            if form and quantization:
                form.packed_by(quantization.of(leaf.index), f"layer {leaf.name}")
        model = self.living_model
        pool = pool_for(model, self.layout, self.rewinds, quantization, self.ranks, self.version)
        pool.forms, pool.mirrored, pool.ask = self.forms, self.mirrored, self.ask
        return pool

    def keyed(self, leaf: Leaf) -> PositionalCache:
        """The cache that a leaf of keys and values belongs to."""
        cache = self.caches[self.kinds[leaf.index]]
        assert isinstance(cache, PositionalCache)
        return cache

    def recurrent(self, leaf: Leaf) -> RecurrentCache:
        """The cache that a leaf of arrays belongs to."""
        cache = self.caches[self.kinds[leaf.index]]
        assert isinstance(cache, RecurrentCache)
        return cache

    def positional(self) -> Iterator[tuple[int, PositionalCache]]:
        """The caches of keys and values, with their indices."""
        for index, cache in enumerate(self.caches):
            if isinstance(cache, PositionalCache):
                yield index, cache

    def new_sequence(self) -> int:
        return next(self._names)

    def drop(self, sequence: int) -> None:
        """Forget a sequence at the next safe moment. Finalizers may call this: it takes no lock."""
        self._dropped.append(sequence)

    def free_dropped(self) -> None:
        """Give back at once what is dropped, or at the end of the forward under way."""
        with self.lock:
            self._sweep_between_forwards()

    def take_turn(self, user: User) -> None:
        """Let `user` change the caches, after undoing what another left unfinished."""
        last = self._user and self._user()
        if last is not user:
            if last and last.unfinished:
                last.abandon()
                last.interrupted = True
            self._user = weakref.ref(user)
        self._note_thread()
        self._sweep()

    def _note_thread(self) -> None:
        """Notice when a second thread that is alive comes to use the pool."""
        current, last = threading.current_thread(), self._thread and self._thread()
        if last is current:
            return
        if last and last.is_alive() and not self._is_shared:
            self._is_shared = True
            # A file's arrays that another thread has not read yet are nobody else's business.
            with suppress(RuntimeError):
                self.compute_all()
        self._thread = weakref.ref(current)

    def compute_all(self) -> None:
        """Have all arrays of the pool computed."""
        self.compute([*self.buffers, *self._states()])

    def _states(self) -> Iterator[mx.array]:
        """All arrays of recurrences."""
        for cache in self.caches:
            if isinstance(cache, RecurrentCache):
                for stream in cache._streams.values():
                    yield from arrays_in(stream.states.values())

    def commit(self, plan: Plan) -> None:
        """Make an edit, if all ranks are ready for it."""
        self.ranks.ready()
        self.apply(plan)

    def apply(self, plan: Plan) -> None:
        """Make an edit that the ranks have agreed on."""
        self.compute(plan.arrays())
        plan.commit()

    def plan_forward(self, batch: Batch | None) -> Plan:
        """Plan to take a batch's tokens into all caches. Raises what `start_forward` does."""
        return JointPlan([cache._plan_forward(batch) for cache in self.caches] if batch else [])

    def wants_handles(self, sequence: int) -> bool:
        """Whether attention to a sequence as it is stored saves copies: in several runs, or packed."""
        spans = (cache._table[sequence].spans for _, cache in self.positional())
        return self.quantization is not None or any(len(own) > 1 for own in spans)

    def end(self, sequence: int) -> int:
        return self.caches[0]._end(sequence)

    def plan_truncate(self, sequence: int, position: int) -> list[Plan]:
        """Plan to drop the tokens from `position` on. Raises NotSupportedError where a recurrence cannot."""
        return [cache._plan_remove(sequence, position, None) for cache in self.caches]

    def copy(self, src: int, dst: int) -> None:
        """Let `dst` share all of `src`."""
        self.commit(JointPlan([cache._plan_copy(src, dst, self.end(src)) for cache in self.caches]))

    def restore(self, sequence: int, snapshots: Sequence[Any]) -> None:
        """Let a sequence be what these say, one for each cache, not computed yet.

        Raises:
            ValueError: other heads.
        """
        pairs = zip(self.caches, snapshots, strict=True)
        self.ranks.ready()
        JointPlan([cache._plan_restore(sequence, snapshot) for cache, snapshot in pairs]).commit()

    def can_resume(self, sequence: int, position: int) -> bool:
        return all(cache._can_resume(sequence, position) for cache in self.caches)

    def resume_point(self, sequence: int, position: int) -> int:
        """The newest position <= `position` that all caches can go on from."""
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
                # The model may be given another precision before it writes again.
                if isinstance(cache, PositionalCache) and not cache._table.sequences:
                    cache._store.layers.clear()
                elif isinstance(cache, RecurrentCache) and not cache._streams:
                    cache._forms.clear()


def _resume_point(cache: PlanningCache, sequence: int, position: int) -> int:
    """The newest position <= `position` that one cache can go on from."""
    if isinstance(cache, RecurrentCache):
        return cache.prepare_restore(sequence, position) or 0
    assert isinstance(cache, PositionalCache)
    rule = cache._rule
    # Where what a token sees is not held, neither is what the tokens shortly before it see:
    # only a chunk's head sees nothing, and the sinks see only each other.
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
) -> Pool:
    """The model's pool of this form: prompt caches that are made alike can join one batch.

    Caches that are made after the model's weights have changed are not made alike.
    """
    version = version or version_of(model)
    # A pool keeps its version alive, so the id is no other's.
    key, pools = (id(version), layout, tuple(rewinds), quantization, ranks), _pools.of(model)
    with _lock:
        pool = pools.get(key)
        if pool is None:
            pool = pools[key] = Pool(model, layout, rewinds, quantization, ranks, version)
        return pool
