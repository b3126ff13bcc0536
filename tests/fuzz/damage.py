"""Damage to what a file says: edits anywhere in a tree of JSON, and to named arrays."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from mlx_kvcache.persist.container import Stored
from mlx_kvcache.persist.header import SIZES

NUMBERS = (-1, 0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 64, 2**31 - 1, 2**31, 2**40, 2**40 + 1, 2**63, 10**30)
TEXTS = (
    "",
    "0",
    "1",
    "00",
    "\u0661",
    "-1",
    "1.5",
    "a",
    "keys",
    "float32",
    "F16",
    "BF16",
    "I32",
    "C64",
    "x" * 99,
)


def often(usual: st.SearchStrategy[Any], seldom: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The one five times in six, the other else; `|` would count the parts of each."""
    return st.integers(0, 5).flatmap(lambda drawn: usual if drawn else seldom)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers(-3, 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=4,
)


class Edit(NamedTuple):
    """One change to a tree: what is done, where (modulo what there is), and with what."""

    action: str
    place: int
    other: int
    value: Any


ACTIONS = ("replace", "replace", "replace", "add", "subtract", "delete", "double", "swap", "rename", "copy")


def edits_with(some: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Edit]]:
    """A few edits that put such values in."""
    place = st.integers(0, 999)
    return st.lists(st.builds(Edit, st.sampled_from(ACTIONS), place, place, some), min_size=1, max_size=4)


edits = edits_with(values)

ARRAY_ACTIONS = ("delete", "rename", "swap", "dtype", "shape", "empty", "noise", "longer")

array_edits = st.lists(
    st.builds(Edit, st.sampled_from(ARRAY_ACTIONS), st.integers(0, 99), st.integers(0, 99), values),
    max_size=2,
)

Place = tuple[Any, Any]
"""A dict or list, and a key of it."""


def edited(tree: Any, changes: list[Edit]) -> Any:
    """A copy of a tree with these edits."""
    root = [copy.deepcopy(tree)]
    for change in changes:
        places = _places(root)
        holder, key = places[change.place % len(places)]
        other = places[change.other % len(places)]
        _apply(change, holder, key, other)
    return root[0] if root else None


def _places(tree: Any) -> list[Place]:
    """Everywhere that something is, from the outside in."""
    found: list[Place] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in items:
            found.append((holder, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def _apply(change: Edit, holder: Any, key: Any, other: Place) -> None:
    value = holder[key]
    if change.action == "replace":
        holder[key] = change.value
    elif change.action in {"add", "subtract"}:
        step = 1 + change.other % 3
        is_number = isinstance(value, (int, float))
        holder[key] = value + (step if change.action == "add" else -step) if is_number else change.value
    elif change.action == "delete":
        # The root stays, so that there is something to edit.
        if value is not holder and not (isinstance(holder, list) and len(holder) == 1):
            del holder[key]
    elif change.action == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif change.action == "swap":
        holder[key] = copy.deepcopy(other[0][other[1]])
    elif change.action == "rename" and isinstance(holder, dict):
        name = str(change.value) if isinstance(change.value, (int, str)) else "1"
        holder[name] = holder.pop(key)
    elif change.action == "copy" and isinstance(holder, dict):
        holder[str(change.other % 4)] = copy.deepcopy(value)


def edited_arrays(arrays: dict[str, Stored], changes: list[Edit]) -> dict[str, Stored]:
    """The arrays with these edits; each still has as many bytes as its shape takes."""
    found = dict(arrays)
    for change in changes:
        names = list(found)
        if not names:
            break
        name, other = names[change.place % len(names)], names[change.other % len(names)]
        dtype, shape, data = found[name]
        if change.action == "delete":
            del found[name]
        elif change.action == "rename":
            found[str(change.value)[:40]] = found.pop(name)
        elif change.action == "swap":
            found[name], found[other] = found[other], found[name]
        elif change.action == "dtype":
            found[name] = _of(data, list(SIZES)[change.other % len(SIZES)], shape)
        elif change.action == "shape":
            rolled = shape[::-1] if change.other % 3 else (*shape, 1)
            found[name] = Stored(dtype, rolled if change.other % 5 else shape[1:] + shape[:1], data)
        elif change.action == "empty":
            found[name] = Stored(dtype, (0, *shape[1:]), data[:0].copy())
        elif change.action == "noise":
            noise = np.random.default_rng(change.other).integers(0, 256, data.size, np.uint8)
            found[name] = Stored(dtype, shape, noise)
        elif shape:
            found[name] = Stored(dtype, (shape[0] * 2, *shape[1:]), np.concatenate([data, data]))
    return found


def _of(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str, shape: tuple[int, ...]) -> Stored:
    """An array of this shape and another dtype, of what bytes there are and zeros."""
    needed = SIZES[dtype] * int(np.prod(shape))
    return Stored(dtype, shape, np.resize(data, needed) if data.size else np.zeros(needed, np.uint8))
