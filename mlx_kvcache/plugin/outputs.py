"""The logits in what a model's call returns: an array, or an object that has them as `.logits`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..errors import NotSupportedError


def found_logits(output: Any) -> mx.array | None:
    """The logits in a model's output, None where there are none."""
    logits = output if isinstance(output, mx.array) else getattr(output, "logits", None)
    return logits if isinstance(logits, mx.array) else None


def logits_of(model: Any, inputs: mx.array, cache: Any) -> mx.array:
    """Call a model and return its logits.

    Raises:
        NotSupportedError: the model returned neither an array nor an object with `.logits`.
    """
    output = model(inputs, cache=cache)
    logits = found_logits(output)
    if logits is None:
        raise NotSupportedError(
            f"{type(model).__module__} returned a {type(output).__name__}; its logits must be an array, or "
            "the attribute .logits of an object"
        )
    return logits


def joined(outputs: Sequence[Any], join: Callable[[list[mx.array]], mx.array]) -> Any:
    """The output of one call for the rows of several: each array in it is made of theirs.

    Raises:
        NotSupportedError: an output holds something other than arrays, lists of arrays and None.
    """
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, mx.array):
        return join(list(outputs))
    if type(first) in (list, tuple):
        return type(first)(joined(parts, join) for parts in zip(*outputs, strict=True))
    if found_logits(first) is None or not hasattr(first, "__dict__"):
        raise NotSupportedError(
            f"the outputs of calls for several rows cannot be joined: a {type(first).__name__} is in them"
        )
    whole = copy.copy(first)
    for name in vars(first):
        # The class may be frozen.
        object.__setattr__(whole, name, joined([getattr(output, name) for output in outputs], join))
    return whole
