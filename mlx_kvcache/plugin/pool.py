"""The cells that prompt caches of one model share."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from itertools import count
from typing import Protocol

import mlx.nn as nn

from ..caches.causal import CausalCache
from .probe import scheme_of
from .rotation import Scheme


class User(Protocol):
    """Who can have a forward under way in a pool."""

    interrupted: bool

    @property
    def unfinished(self) -> bool: ...

    def settle(self) -> None: ...


class Pool:
    """One cache whose sequences are prompt caches: a fork shares cells with its origin.

    A pool has no bound of its own; each prompt cache has its `capacity`.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.model = model
        self.layers = layers
        self.cache = CausalCache()
        self.cache.init(dtype=None, capacity=sys.maxsize, max_batch=sys.maxsize)
        self._names = count()
        self._dropped: deque[int] = deque()
        self._user: weakref.ref[User] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, counted once however many prompt caches share them."""
        user = self._user and self._user()
        if not (user and user.unfinished):
            self._sweep()
        return self.cache.nbytes

    @property
    def scheme(self) -> Scheme:
        """How the model tells positions apart; the first call runs the model on a few tokens."""
        return scheme_of(self.model)

    def new_sequence(self) -> int:
        return next(self._names)

    def drop(self, sequence: int) -> None:
        """Forget a sequence at the next safe moment: garbage collection can call this at any."""
        self._dropped.append(sequence)

    def take_turn(self, user: User) -> None:
        """Let `user` change the cache, after undoing what another left unfinished."""
        last = self._user and self._user()
        if last and last is not user and last.unfinished:
            last.settle()
            last.interrupted = True
        self._user = weakref.ref(user)
        self._sweep()

    def _sweep(self) -> None:
        while self._dropped:
            self.cache.remove(self._dropped.popleft(), 0)
