"""Counts primitives in MLX's graph, and calls of Python functions."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip
"""Primitives that compute nothing."""


def primitives(*outputs: mx.array) -> Counter[str]:
    """The primitives by name that must be computed for some arrays, views left out."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    names = re.findall(r'label ?= ?"(\w+)[^"]*", shape ?= ?rectangle', text.getvalue())
    return Counter(name for name in names if name not in VIEWS)


def python_calls(step: Callable[[], object], *places: str) -> int:
    """The number of Python functions in these files or folders that a step calls."""
    found = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(places)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Every choice that depends on the device is made as on a GPU; the CPU computes all the same."""
    with patch("mlx_kvcache.storage.codec.is_cpu", lambda: False):
        yield


@contextmanager
def unevaluated(cache: Any) -> Iterator[None]:
    """The pool discards what it should compute, so that the graph of a token can be counted."""
    with patch.object(cache[0].rows.pool, "is_scratch", True):
        yield


@contextmanager
def fused() -> Iterator[None]:
    """What is one kernel on a GPU is one primitive here, where MLX composes it of several on a CPU.

    The results are of the right shape, and wrong.
    """

    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Any = None, **more: Any) -> mx.array:
        return _one((*q.shape[:3], v.shape[3]), q, k, v, *(a for a in (mask, *more.values()) if _is_array(a)))

    def alike(x: mx.array, *rest: Any, **more: Any) -> mx.array:
        return _one(x.shape, x, *(a for a in (*rest, *more.values()) if _is_array(a)))

    with ExitStack() as stack:
        stack.enter_context(patch.object(mx.fast, "scaled_dot_product_attention", attend))
        for name in ("rms_norm", "layer_norm", "rope"):
            stack.enter_context(patch.object(mx.fast, name, alike))
        yield


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)


def _one(shape: tuple[int, ...], *inputs: mx.array) -> mx.array:
    """An array of this shape which one primitive makes of the inputs."""
    blank = mx.zeros(shape, inputs[0].dtype)
    mx.eval(blank)
    made: list[mx.array] = mx.depends([blank], list(inputs))
    return made[0]
