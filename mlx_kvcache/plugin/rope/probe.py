"""Finding a model's position scheme by watching it: nothing that is not verified is believed.

The model runs on a few tokens with empty caches, once from position 0 and once from a later
one, while the calls of `mx.fast.rope` are recorded. A recorded call is a layer's rotation if
it turns what the first run cached into what the second did.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ...cells.visibility import Chunk
from ...rope import RopeShift
from ..hosts.layout import Entry, Layout, Leaf, layout_of, logits_of
from ..hosts.lifetimes import PerModel
from ..ranks import ALONE, Ranks
from .rebase import Rotation, Scheme, Slot

TOKENS = 7
NEAR = 5
"""A small odd distance between the two runs."""
_EXACT = {mx.float32: 1e-4}
_ROUNDED = 3e-2
_SLOTS: tuple[Slot, Slot] = (0, 1)
_NAMES = ("keys", "values")
_ABOUT_POSITIONS = re.compile("position|original|window|chunk|floor|context|seq")


class _Schemes:
    """The position schemes of a model, by number of ranks."""

    def __init__(self) -> None:
        # Held while the model runs, so that it is watched once, and no other model waits for that.
        self.lock = threading.RLock()
        self.found: dict[int, Scheme] = {}


_schemes = PerModel(_Schemes)


def scheme_of(model: nn.Module, ranks: Ranks = ALONE) -> Scheme:
    """The model's position scheme, found once for each model and number of ranks."""
    schemes = _schemes.of(model)
    with schemes.lock:
        if ranks.size not in schemes.found:
            schemes.found[ranks.size] = _agreed(_probe(model, ranks), ranks)
        return schemes.found[ranks.size]


class _Probe:
    """A leaf of keys and values that holds nothing, at a position that is given."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.start_position = offset
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.stored: Stored = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = self.stored = keys, values
        return keys, values

    def keys_and_values(self) -> Stored:
        return self.stored

    def maybe_trim_front(self) -> None:
        pass

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if not return_array and (window_size is None or n <= window_size):
            return None if n == 1 else "causal"
        rows = mx.arange(n)[:, None] - mx.arange(n)[None]
        return (rows >= 0) & (rows < (window_size or n))


Stored = tuple[mx.array, mx.array] | None
Run = tuple[mx.array, list[Stored]]


def _run(model: nn.Module, layout: Layout, offset: int, ranks: Ranks) -> Run:
    leaves: list[Any] = []

    def stand_in(entry: Entry) -> Any:
        if not isinstance(entry, Leaf):
            return mlx_lm_cache.CacheList(*map(stand_in, entry))
        leaves.append(mlx_lm_cache.ArraysCache(entry.slots) if entry.rule is None else _Probe(offset))
        return leaves[-1]

    with ranks.together(f"look for rotations, {offset} tokens away"):
        logits = logits_of(model, mx.arange(1, TOKENS + 1)[None], [*map(stand_in, layout.entries)])
    stored = [getattr(leaf, "stored", None) for leaf in leaves]
    # In one go: of a pipeline, a rank that evaluated its keys first would not send what the next one needs.
    mx.eval(logits, stored)
    return logits, stored


def _agreed(scheme: Scheme, ranks: Ranks) -> Scheme:
    """One that all ranks can rely on: each has looked at its own layers or heads."""
    if ranks.is_alone:
        return scheme
    ahead = ranks.least(int(scheme.ahead))
    refusals = ranks.share("tell what keeps tokens from being moved", scheme.refusal or "")
    refusal = next(
        (f"of rank {rank}, {found}" for rank, found in enumerate(refusals) if found), scheme.refusal
    )
    return Scheme(scheme.rotations, bool(ahead), refusal)


def _probe(model: nn.Module, ranks: Ranks) -> Scheme:
    layout = layout_of(model)
    layers = len(layout.leaves)
    distance = _near(layout)
    with _recorded() as shifts:
        here = _run(model, layout, 0, ranks)
        near = _run(model, layout, distance, ranks)
    with _recorded() as far_shifts:
        far = {distance: _run(model, layout, distance, ranks)[0] for distance in _beyond(model)}
    rotations: list[Rotation | None] = []
    for index, (first, second) in enumerate(zip(here[1], near[1], strict=True)):
        found, refusal = _layer_rotation(index, shifts, distance, first, second)
        if refusal:
            return Scheme((None,) * layers, False, refusal)
        rotations.append(found)
    if any(not _among(shift, shifts) for shift in far_shifts):
        return Scheme((None,) * layers, False, "its rotation depends on the length")
    noise = _difference(here[0], near[0])
    rounded = _EXACT.get(here[0].dtype, _ROUNDED)
    ahead = noise <= 10 * rounded and all(
        # Float32 angles are exact to distance * 2**-24.
        _difference(here[0], logits) <= max(10 * _EXACT[mx.float32], 3 * noise) + distance * 2**-22
        for distance, logits in far.items()
    )
    return Scheme(tuple(rotations), ahead)


def _layer_rotation(
    index: int, shifts: list[RopeShift], distance: int, first: Stored, second: Stored
) -> tuple[Rotation | None, str | None]:
    """What moves a layer's keys and values from the first run's position to the second's, or a refusal."""
    found: Rotation | None = None
    if first is None or second is None:
        return None, None
    for array_0, array_1, slot in zip(first, second, _SLOTS, strict=True):
        if _close(array_0, array_1):
            continue
        rotation = _explanation(shifts, distance, array_0, array_1, slot)
        if rotation is None:
            return None, f"layer {index} caches {_NAMES[slot]} that no rotation takes to another position"
        if found is None:
            found = rotation
        elif rotation.shift is found.shift and rotation.start == found.start:
            found = found._replace(slots=_SLOTS)
        else:
            return None, f"layer {index} rotates keys and values by different angles"
    return found, None


def _among(shift: RopeShift, shifts: list[RopeShift]) -> bool:
    """Whether the same rotation is there; frequencies are compared by identity."""
    return any(
        (s.dims, s.traditional, s.base, s.scale) == (shift.dims, shift.traditional, shift.base, shift.scale)
        and s.freqs is shift.freqs
        for s in shifts
    )


_recorders = threading.local()
_watching: Counter[Any] = Counter()
"""How many recordings are under way in each stand-in for `mx.fast.rope`."""
_switch = threading.Lock()


@contextmanager
def _recorded() -> Iterator[list[RopeShift]]:
    """Collect the different rotations that this thread makes inside. Other threads notice nothing."""
    before, calls = getattr(_recorders, "calls", None), list[RopeShift]()
    with _switch:
        stand_in: Any = mx.fast.rope if mx.fast.rope in _watching else _stand_in(mx.fast.rope)
        _watching[stand_in] += 1
        mx.fast.rope = stand_in
    try:
        _recorders.calls = calls
        yield calls
    finally:
        _recorders.calls = before
        with _switch:
            _watching[stand_in] -= 1
            if not _watching[stand_in]:
                del _watching[stand_in]
                if mx.fast.rope is stand_in:
                    mx.fast.rope = vars(stand_in)["__wrapped__"]


def _stand_in(original: Any) -> Any:
    """A function like `mx.fast.rope` that also notes the calls of threads that record."""

    @functools.wraps(original)
    def rope(*args: Any, **kwargs: Any) -> Any:
        calls = getattr(_recorders, "calls", None)
        if calls is not None:
            shift = _shift(*args, **kwargs)
            if not _among(shift, calls):
                calls.append(shift)
        return original(*args, **kwargs)

    return rope


def _shift(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
    **more: Any,
) -> RopeShift:
    """The rotation that a call of `mx.fast.rope` makes."""
    return RopeShift(dims, base, traditional, scale, freqs)


def _explanation(
    shifts: list[RopeShift], distance: int, first: mx.array, second: mx.array, slot: Slot
) -> Rotation | None:
    """The recorded rotation, of the first or the last features, that leads from `first` to `second`."""
    width = first.shape[-1]
    for shift in shifts:
        for start in dict.fromkeys((0, width - shift.dims)):
            rotation = Rotation(shift, (slot,), start)
            if 0 <= start <= width - shift.dims and _close(rotation.apply(first, distance), second):
                return rotation
    return None


def _close(a: mx.array, b: mx.array) -> bool:
    a, b, limit = a.astype(mx.float32), b.astype(mx.float32), _EXACT.get(a.dtype, _ROUNDED)
    return not a.size or bool((mx.abs(a - b).max() <= limit * mx.abs(a).max()).item())


def _difference(a: mx.array, b: mx.array) -> float:
    """How far logits differ, in units of their own spread."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    spread = mx.square(a - a.mean(axis=-1, keepdims=True)).mean()
    ratio: float = mx.sqrt(mx.square(a - b).mean() / spread).tolist()  # type: ignore[assignment]
    return ratio


def _near(layout: Layout) -> int:
    """The distance between the runs: one that leaves chunks where they are, if they are very short."""
    chunks = [rule.size for rule in layout.rules if isinstance(rule, Chunk) and rule.size < NEAR + TOKENS]
    return math.lcm(*chunks) if chunks else NEAR


def _beyond(model: nn.Module) -> list[int]:
    """Positions just above every number in the configuration that could be a threshold, and one far above."""
    arguments = getattr(model, "args", None)
    config = asdict(arguments) if is_dataclass(arguments) and not isinstance(arguments, type) else {}
    found = sorted({n for n in _thresholds(config) if NEAR < n <= 1 << 20})
    return [n + NEAR for n in found] + [2 * n + 1 for n in found[-1:]]


def _thresholds(config: Any, name: str = "") -> Iterator[int]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _thresholds(value, str(key))
    elif isinstance(config, int) and not isinstance(config, bool) and _ABOUT_POSITIONS.search(name):
        yield config
