"""Changes that are computed whole before any of them is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx


class Plan(ABC):
    """A change that has been computed whole, so that it cannot fail, but be interrupted.

    Whoever joins plans calls `make` of all, and then `settle` of all, or `unmake` where
    something came between.
    """

    made = 0
    """How often `again` has made the change, or anything that tells one number from another."""

    def commit(self) -> None:
        """Make the change, or nothing where an exception comes from outside, at any point."""
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
        """Put everything back, however far `make` came."""

    def settle(self) -> None:  # noqa: B027
        """Let go of what only `unmake` needs, if there is any. Changes nothing that anybody sees."""

    def undo(self) -> None:
        """Take a step that was made out again; nothing where it was not. Only plans of steps can."""
        raise NotImplementedError

    def arrays(self) -> Iterable[mx.array]:
        """New arrays of the change, which can be computed before it is made."""
        return ()

    @property
    def is_under_way(self) -> bool:
        """Whether this is a step that was made and is neither over nor taken out again."""
        return False

    def finish(self) -> None:  # noqa: B027
        """End a step that is under way: it can be read, and nothing more can be put.

        Raises:
            CacheError: a layer lacks keys and values; whoever calls this then calls `undo`.
        """

    def again(self) -> bool:
        """Commit as many tokens more, where that is as simple as before; else False, and nothing."""
        return False


class JointPlan(Plan):
    """Several plans as one."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    @property
    def made(self) -> int:  # type: ignore[override]
        return sum(plan.made for plan in self._plans)

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
        before = [plan.made for plan in self._plans]
        is_whole = False
        try:
            is_whole = bool(self._plans) and all(plan.again() for plan in self._plans)
        finally:
            if not is_whole:
                for plan, made in zip(self._plans, before, strict=True):
                    if plan.made != made:
                        plan.undo()
        return is_whole
