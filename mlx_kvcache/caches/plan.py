"""Changes that are computed whole before any of them is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Plan(ABC):
    """A change that has been computed whole. Neither method can fail."""

    @abstractmethod
    def commit(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Put the bookkeeping back as it was before `commit`; only plans of steps can."""
        raise NotImplementedError

    def again(self) -> bool:
        """Commit as many tokens more, where that is as simple as before; else False, and nothing."""
        return False


class JointPlan(Plan):
    """Several plans as one."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    def commit(self) -> None:
        for plan in self._plans:
            plan.commit()

    def undo(self) -> None:
        for plan in reversed(self._plans):
            plan.undo()

    def again(self) -> bool:
        for index, plan in enumerate(self._plans):
            if not plan.again():
                for done in reversed(self._plans[:index]):
                    done.undo()
                return False
        return bool(self._plans)
