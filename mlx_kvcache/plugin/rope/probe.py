"""Finds how a model encodes positions by running it and verifying the result.

The model runs on a few tokens with empty caches, once from position 0 and once from a later position, while
calls of `mx.fast.rope` are recorded. A recorded call is accepted as a layer's rotation if it turns the keys
cached by the first run into those cached by the second.

In 16 bits, deep models amplify rounding until the keys of later layers have little in common. So there the
keys are those of two more runs, in which attention finds zeros: then positions enter the keys only.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...cells.visibility import Chunk
from ...rope import RopeShift
from ..hosts.host import logits_of
from ..hosts.layout import Entry, Layout, Leaf, configuration_of, host_of, layout_of
from ..hosts.observe import PerModel
from ..ranks import ALONE, Ranks
from .axes import ARGUMENT, axes_of
from .rebase import Rotation, Scheme, Slot

TOKENS = 7
NEAR = 5
"""Distance between the positions of the two runs, small and odd."""
_EXACT = {mx.float32: 1e-4}
_ROUNDED = 3e-2
_SLOTS: tuple[Slot, Slot] = (0, 1)
_NAMES = ("keys", "values")
_ABOUT_POSITIONS = re.compile("position|original|window|chunk|floor|context|seq")


_schemes: PerModel[tuple[threading.RLock, dict[int, Scheme]]] = PerModel(lambda: (threading.RLock(), {}))
"""For each model, a lock that is held while it is probed, and its schemes by number of ranks."""


def scheme_of(model: nn.Module, ranks: Ranks = ALONE) -> Scheme:
    """Return the model's position scheme. It is found once for each model and number of ranks."""
    lock, found = _schemes.of(model)
    with lock:
        if ranks.size not in found:
            found[ranks.size] = _agreed(_probe(model, ranks), ranks)
        return found[ranks.size]


class _Probe:
    """An empty cache of keys and values at a given position. It keeps the newest call's arrays.

    A blank one gives attention zeros instead.
    """

    def __init__(self, offset: int, is_blank: bool) -> None:
        self.offset = self.start_position = offset
        self.is_blank = is_blank
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.stored: Stored = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = self.stored = keys, values
        return (mx.zeros_like(keys), mx.zeros_like(values)) if self.is_blank else (keys, values)

    @property
    def state(self) -> Stored:
        return self.stored

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


def _run(
    model: nn.Module,
    layout: Layout,
    offset: int,
    ranks: Ranks,
    unwritten: Container[int] = (),
    is_blank: bool = False,
) -> tuple[mx.array, list[Stored]]:
    """Return the logits of a few tokens, and what each leaf has stored.

    Args:
        unwritten: leaves that the model never writes, whose offset stays 0.
        is_blank: whether attention finds zeros instead of keys and values.
    """
    leaves, caches = list[Any](), host_of(model).caches

    def stand_in(entry: Entry) -> Any:
        if not isinstance(entry, Leaf):
            return caches.CacheList(*map(stand_in, entry))
        leaves.append(
            caches.ArraysCache(entry.slots)
            if entry.rule is None
            else _Probe(0 if len(leaves) in unwritten else offset, is_blank)
        )
        return leaves[-1]

    with ranks.together(f"look for rotations, {offset} tokens away"):
        axes = axes_of(model)
        told = {ARGUMENT: axes.plain([offset], TOKENS)} if axes else {}
        logits = logits_of(model, mx.arange(1, TOKENS + 1)[None], [*map(stand_in, layout.entries)], **told)
    stored = [getattr(leaf, "stored", None) for leaf in leaves]
    # One call for both: in a pipeline, evaluating keys first would not send what the next rank waits for.
    mx.eval(logits, stored)
    return logits, stored


def _agreed(scheme: Scheme, ranks: Ranks) -> Scheme:
    """Combine the schemes of all ranks, each of which has probed only its own layers or heads."""
    if ranks.is_alone:
        return scheme
    ahead = ranks.least(int(scheme.ahead))
    refusals = ranks.share("compare why tokens cannot be moved", scheme.refusal or "")
    refusal = next((f"rank {rank}: {found}" for rank, found in enumerate(refusals) if found), scheme.refusal)
    return Scheme(scheme.rotations, bool(ahead), refusal)


def _probe(model: nn.Module, ranks: Ranks) -> Scheme:
    layout = layout_of(model)
    distance = _near(layout)
    with _recorded() as shifts:
        logits, stored = _run(model, layout, 0, ranks)
        unwritten = {index for index, own in enumerate(stored) if own is None}
        try:
            near_logits, near_stored = _run(model, layout, distance, ranks, unwritten)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            if not ranks.is_alone:
                raise
            refusal = f"the model does not run from position {distance} of an empty cache: {error}"
            return Scheme((None,) * len(stored), False, refusal)
    with _recorded() as far_shifts:
        far = {place: _run(model, layout, place, ranks, unwritten)[0] for place in beyond(model)}
    unrecorded = _unrecorded(model)
    if not ranks.least(all(own is None or own[0].dtype in _EXACT for own in stored)):
        stored, near_stored = (
            _run(model, layout, place, ranks, unwritten, is_blank=True)[1] for place in (0, distance)
        )
    try:
        rotations = tuple(
            _layer_rotation(index, [*shifts, *unrecorded], distance, first, second)
            for index, (first, second) in enumerate(zip(stored, near_stored, strict=True))
        )
        if set(map(_key, far_shifts)) - set(map(_key, shifts)):
            raise _RefusedError("its rotation depends on the sequence length")
    except _RefusedError as refusal:
        return Scheme((None,) * len(stored), False, str(refusal))
    noise = _difference(logits, near_logits)
    rounded = _EXACT.get(logits.dtype, _ROUNDED)
    ahead = noise <= 10 * rounded and all(
        # Float32 angles have an error of about distance * 2**-24.
        _difference(logits, others) <= max(10 * _EXACT[mx.float32], 3 * noise) + place * 2**-22
        for place, others in far.items()
    )
    own = {_key(rotation.shift) for rotation in rotations if rotation}
    if not ahead and own & set(map(_key, unrecorded)):
        # It is not known whether such a rotation changes with the length.
        return Scheme((None,) * len(stored), False, "its output depends on positions, not on distances only")
    return Scheme(rotations, ahead)


class _RefusedError(Exception):
    """Says why the tokens of a model cannot be moved."""


def _layer_rotation(
    index: int, shifts: list[RopeShift], distance: int, first: Stored, second: Stored
) -> Rotation | None:
    """Return the rotation between what two runs stored, if any. Raises _RefusedError if none explains it."""
    found: Rotation | None = None
    for slot, before, after in zip(_SLOTS, first or (), second or (), strict=False):
        if _close(before, after):
            continue
        rotation = _explanation(shifts, distance, before, after, slot)
        if rotation is None:
            raise _RefusedError(f"no rotation moves the {_NAMES[slot]} of layer {index} to another position")
        if found and (rotation.shift is not found.shift or rotation.start != found.start):
            raise _RefusedError(f"layer {index} rotates keys and values by different angles")
        found = found._replace(slots=_SLOTS) if found else rotation
    return found


def _key(shift: RopeShift) -> tuple[object, ...]:
    """Return what tells rotations apart; frequencies are compared by identity."""
    return shift.dims, shift.traditional, shift.base, shift.scale, id(shift.freqs)


_recorders = threading.local()
_watching: Counter[Any] = Counter()
"""Number of active recordings for each replacement of `mx.fast.rope`."""
_switch = threading.Lock()


@contextmanager
def _recorded() -> Iterator[list[RopeShift]]:
    """Record the distinct rotations that this thread applies. Calls in other threads are not recorded."""
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
    """Return a function like `mx.fast.rope` that records the calls of recording threads."""

    @functools.wraps(original)
    def rope(a: mx.array, dims: int, **options: Any) -> Any:
        calls = getattr(_recorders, "calls", None)
        if calls is not None:
            base, traditional, scale = (options[name] for name in ("base", "traditional", "scale"))
            shift = RopeShift(dims, base, traditional, scale, options.get("freqs"))
            if _key(shift) not in map(_key, calls):
                calls.append(shift)
        return original(a, dims, **options)

    return rope


def _unrecorded(model: nn.Module) -> list[RopeShift]:
    """Return rotations that modules may apply without `mx.fast.rope`, from their inverse frequencies."""
    found: dict[int, mx.array] = {}
    for module in model.modules():
        for name in ("inv_freq", "_inv_freq"):
            array = getattr(module, name, None)
            if isinstance(array, mx.array) and array.ndim == 1:
                found[id(array)] = array
    every = [1.0 / array.astype(mx.float32) for array in found.values()]
    return [
        RopeShift(2 * freqs.size, None, traditional, 1.0, freqs)
        for freqs in every
        for traditional in (False, True)
    ]


def _explanation(
    shifts: list[RopeShift], distance: int, first: mx.array, second: mx.array, slot: Slot
) -> Rotation | None:
    """Return the recorded rotation, of the first or last features, that turns `first` into `second`."""
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
    """Return the RMS difference of logits, divided by their standard deviation."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    spread = mx.square(a - a.mean(axis=-1, keepdims=True)).mean()
    ratio: float = mx.sqrt(mx.square(a - b).mean() / spread).tolist()  # type: ignore[assignment]
    return ratio


def _near(layout: Layout) -> int:
    """Return the distance between the runs: a multiple of very short chunks, so their borders match."""
    chunks = [rule.size for rule in layout.rules if isinstance(rule, Chunk) and rule.size < NEAR + TOKENS]
    return math.lcm(*chunks) if chunks else NEAR


def beyond(model: nn.Module) -> list[int]:
    """Return positions just above each possible threshold in the configuration, and one far above all."""
    found = sorted({n for n in _thresholds(configuration_of(model)) if NEAR < n <= 1 << 20})
    return [n + NEAR for n in found] + [2 * n + 1 for n in found[-1:]]


def _thresholds(config: Any, name: str = "") -> Iterator[int]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _thresholds(value, str(key))
    elif isinstance(config, int) and not isinstance(config, bool) and _ABOUT_POSITIONS.search(name):
        yield config
