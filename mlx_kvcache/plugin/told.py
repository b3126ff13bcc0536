"""Runs an edit once although mlx-lm calls it on every layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import CacheError

T = TypeVar("T")


class Told:
    """The first layer that is told something does it for all; the others learn the result.

    Args:
        names: of all layers.
        strict: whether layers that are told different things are an error, as edits are. Otherwise
            what is done gives an object, which is not kept alive for the other layers.
    """

    def __init__(self, names: Sequence[str], strict: bool) -> None:
        self._names = names
        self._strict = strict
        self._what: tuple[str, Any] = ("", None)
        self._result: Callable[[], Any] = _nothing
        self._heard: set[int] = set()

    def tell(self, layer: int, name: str, arguments: Any, act: Callable[[], T]) -> T:
        """Do it, or return what it gave when another layer was told the same.

        Args:
            arguments: anything with `==`. They are kept until all layers have been told the same or
                `forget` is called, so let them hold objects by weak references only.

        Raises:
            CacheError: edits differ from layer to layer.
        """
        what = name, arguments
        if self._heard and layer not in self._heard:
            before = self._result()
            if what == self._what and (self._strict or before is not None):
                self._heard.add(layer)
                self._forget_if_done()
                return before  # type: ignore[no-any-return]
            if self._strict:
                other, others = self._what
                raise CacheError(
                    f"layer {self._names[layer]} is told to {name} {arguments}, others to {other} {others}"
                )
        result = act()
        found = (lambda: result) if self._strict else weakref.ref(result)
        self._what, self._result, self._heard = what, found, {layer}
        self._forget_if_done()
        return result

    def forget(self) -> None:
        """Whatever layers have been told is done with."""
        self._what, self._result, self._heard = ("", None), _nothing, set()

    def _forget_if_done(self) -> None:
        if len(self._heard) == len(self._names):
            self.forget()


def _nothing() -> None:
    return None
