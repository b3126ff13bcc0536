"""Doing once what mlx-lm tells every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import CacheError

T = TypeVar("T")


class Told:
    """The first layer that is told something does it for all; the others learn the result.

    Args:
        names: of all layers.
        strict: whether layers that are told different things are an error, as edits are.
    """

    def __init__(self, names: Sequence[str], strict: bool) -> None:
        self._names = names
        self._strict = strict
        self._what: tuple[str, Any] = ("", None)
        self._result: Any = None
        self._heard: set[int] = set()

    def tell(self, layer: int, name: str, arguments: Any, act: Callable[[], T]) -> T:
        """Do it, or return what it gave when another layer was told the same.

        Raises:
            CacheError: edits differ from layer to layer.
        """
        what = name, arguments
        if self._heard and layer not in self._heard:
            if what == self._what:
                self._heard.add(layer)
                result: T = self._result
                self._forget_if_done()
                return result
            if self._strict:
                other, before = self._what
                raise CacheError(
                    f"layer {self._names[layer]} is told to {name} {arguments}, others to {other} {before}"
                )
        result = act()
        self._what, self._result, self._heard = what, result, {layer}
        self._forget_if_done()
        return result

    def forget(self) -> None:
        """Whatever layers have been told is done with."""
        self._result, self._heard = None, set()

    def _forget_if_done(self) -> None:
        if len(self._heard) == len(self._names):
            self.forget()
