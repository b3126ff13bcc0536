"""What a file of mlx-lm's holds, as snapshots for a pool's caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..arrays.lanes import Packed, Plain
from ..arrays.pairs import Form, Lanes
from ..caches import recurrent
from ..caches.snapshot import Run, Snapshot
from ..cells.rules import Chunk, Rule, Window
from ..persist.files import faults_of
from .conversation import Conversation
from .files import check_forms, check_room, check_shift
from .foreign import Entry, Foreign
from .layout import Leaf
from .pool import Pool


def adopt(conversation: Conversation, foreign: Foreign) -> None:
    """Let an empty conversation be what is in a file of mlx-lm's.

    Raises:
        CacheFileError: the file does not fit the model.
        CacheFullError: it holds more tokens than the capacity.
    """
    pool = conversation.pool
    check_room(conversation, foreign.end, foreign.path)
    with faults_of(foreign.path):
        if len(foreign.entries) != len(pool.leaves):
            raise ValueError(
                f"of another model: it has {len(foreign.entries)} layers, the model has {len(pool.leaves)}"
            )
        pairs = list(zip(pool.leaves, foreign.entries, strict=True))
        for leaf, entry in pairs:
            _check_kind(leaf, entry)
        snapshots = [
            _snapshot([pair for pair in pairs if pool.kinds[pair[0].index] == kind], foreign.end, pool)
            for kind in range(len(pool.caches))
        ]
        check_forms(pool, snapshots)
        check_shift(conversation, snapshots)
        pool.restore(conversation.sequence, snapshots)


def storage_of(foreign: Foreign) -> dict[str, Any]:
    """Options of `make_prompt_cache` that store as the file does."""
    for entry in foreign.entries:
        if entry.lanes and isinstance(entry.lanes[0], Packed):
            codec = entry.lanes[0].codec
            return {"kv_bits": codec.bits, "kv_group_size": codec.group_size}
    return {}


def _check_kind(leaf: Leaf, entry: Entry) -> None:
    if _kind(leaf.rule) != (entry.name, entry.sizes):
        told = _kind(leaf.rule)
        raise ValueError(
            f"of another model: layer {leaf.name} of the model is a {told[0]} {told[1] or ''}, that of the "
            f"file a {entry.name} {entry.sizes or ''}"
        )


def _kind(rule: Rule | None) -> tuple[str, tuple[int, ...]]:
    """mlx-lm's class for a rule, and its sizes."""
    if rule is None:
        return "ArraysCache", ()
    if isinstance(rule, Window):
        return "RotatingKVCache", (rule.size + rule.sinks, rule.sinks)
    return ("ChunkedKVCache", (rule.size,)) if isinstance(rule, Chunk) else ("KVCache", ())


def _snapshot(pairs: Sequence[tuple[Leaf, Entry]], end: int, pool: Pool) -> Any:
    """What one of the pool's caches is to hold."""
    if pairs[0][0].rule is None:
        state = {leaf.index: entry.arrays for leaf, entry in pairs}
        return recurrent.Stream(end, {end: state}, True) if end else None
    # Layers that the model never writes are empty.
    written = [(leaf, entry) for leaf, entry in pairs if leaf.index in pool.forms]
    if not written:
        return Snapshot(end, (), {})
    ranges = {entry.ranges for _, entry in written}
    if len(ranges) != 1:
        raise ValueError(f"layers of one kind hold different tokens: {sorted(ranges)}")
    forms = {leaf.index: _form(pool.forms[leaf.index], entry.lanes) for leaf, entry in written if entry.lanes}
    runs, at = [], 0
    for begin, length in ranges.pop():
        index = slice(None), slice(None), slice(at, at + length)
        layers = {leaf.index: _at(entry.lanes, index) for leaf, entry in written if entry.lanes}
        runs.append(Run(begin, length, layers))
        at += length
    return Snapshot(end, tuple(runs), forms)


def _at(lanes: Lanes, index: tuple[slice, slice, slice]) -> Lanes:
    return lanes[0].at(index), lanes[1].at(index)


def _form(expected: Form | None, lanes: Lanes) -> Form:
    """The form of lanes; packed ones do not say of which dtype they were."""
    assert expected is not None
    own = zip(lanes, (expected.key_dtype, expected.value_dtype), strict=True)
    dtypes = [lane.array.dtype if isinstance(lane, Plain) else dtype for lane, dtype in own]
    if not all(mx.issubdtype(dtype, mx.floating) for dtype in dtypes):
        raise ValueError(f"keys and values are {dtypes[0]} and {dtypes[1]}, expected floats")
    keys, values = lanes
    return Form(keys.arrays[0].shape[1], keys.dim, values.dim, dtypes[0], dtypes[1])
