"""Plans: changes of a cache that are computed completely before any part of them is made.

A plan is made, and then either settled or unmade.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx


class Plan(ABC):
    """A computed change of a cache. It cannot fail, but an exception such as ctrl-C can interrupt it.

    `commit` makes it. To make several plans together, call `make` of all and then `settle` of all; if
    anything interrupts that, call `unmake` of all in reverse order.
    """

    made = 0
    """Counts successful `again` calls, so that a caller can tell whether an interrupted one took effect."""

    def commit(self) -> None:
        """Make the change. An exception at any point leaves the cache unchanged."""
        try:
            self.make()
        except BaseException:
            self.unmake()
            raise
        self.settle()

    @abstractmethod
    def make(self) -> None:
        """Make the change."""

    @abstractmethod
    def unmake(self) -> None:
        """Roll back `make`, however far it came."""

    def settle(self) -> None:  # noqa: B027
        """Free whatever only `unmake` needs. Changes nothing visible."""

    def undo(self) -> None:
        """Remove the tokens of a forward pass again, if it was made and the cache has not changed since.

        Only plans of forward passes implement this.
        """
        raise NotImplementedError

    def arrays(self) -> Iterable[mx.array]:
        """Return the change's new arrays, which can be evaluated before it is made."""
        return ()

    @property
    def is_under_way(self) -> bool:
        """Whether this is a forward pass that was made and is neither finished nor undone."""
        return False

    def finish(self) -> None:  # noqa: B027
        """End a forward pass under way: `get` still works, `put` raises.

        Raises:
            CacheError: a layer lacks keys and values. The caller must then call `undo`.
        """

    def again(self) -> bool:
        """Extend the last forward pass by the same number of tokens, if nothing changed in between.

        Returns False, and does nothing, if that is not possible.
        """
        return False


class JointPlan(Plan):
    """Several plans as one."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    def make(self) -> None:
        for plan in self._plans:
            plan.make()

    def unmake(self) -> None:
        for plan in reversed(self._plans):
            plan.unmake()

    def settle(self) -> None:
        for plan in self._plans:
            plan.settle()

    def arrays(self) -> Iterator[mx.array]:
        for plan in self._plans:
            yield from plan.arrays()

    def undo(self) -> None:
        for plan in reversed(self._plans):
            plan.undo()

    @property
    def is_under_way(self) -> bool:
        return any(plan.is_under_way for plan in self._plans)

    def finish(self) -> None:
        for plan in self._plans:
            plan.finish()

    def again(self) -> bool:
        if not self._plans:
            return False
        before = self.made
        try:
            for plan in self._plans:
                if not plan.again():
                    return False
            self.made += 1
        finally:
            if self.made == before:
                for plan in self._plans:
                    if plan.made != before:
                        plan.undo()
        return True
