"""A conversation as a file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arrays.lanes import Lane, Packed
from ..arrays.pairs import Form
from ..cells.rules import Window
from ..errors import CacheError, CacheFullError
from ..persist.checks import integer, listing, mapping
from ..persist.files import Opened, Prepared, faults_of, prepare
from ..persist.positional import decode_codec, decode_lane, encode_lane
from .conversation import Conversation
from .fingerprint import fingerprint, first_form, is_first_form, version_of
from .head import Head, Piece
from .making import options_of
from .pool import Pool
from .rotation import Slot

_HEAD = "head"


def prepared(
    conversation: Conversation, tokens: Sequence[int] | None = None, tokenizer: Any = None
) -> Prepared:
    """What is to be written of a conversation.

    Raises:
        ValueError: another number of tokens.
        CacheError: the model has other weights by now, which the file would say it is of.
    """
    conversation.check_open()
    if conversation.pool.version is not version_of(conversation.pool.living_model):
        raise CacheError(
            "cannot save: the model's weights have changed since this cache was made, so it is not of "
            "these weights; make a new cache and compute its tokens again"
        )
    extra: dict[str, mx.array] = {}
    head = _encode_head(conversation.head, extra)
    return prepare(
        conversation.pool.caches,
        conversation.sequence,
        tokens,
        fingerprint(conversation.pool.living_model, tokenizer),
        options_of(conversation) | {_HEAD: head},
        extra,
    )


def restore(conversation: Conversation, opened: Opened, tokenizer: Any = None) -> None:
    """Let an empty conversation be what is in a file.

    Raises:
        CacheFileError: the file is of another model, or what it tells does not fit this one.
        CacheFullError: it holds more tokens than the capacity.
    """
    pool = conversation.pool
    model = pool.living_model
    expected = fingerprint(model, tokenizer)
    if is_first_form(opened.model.get("weights")):
        expected["weights"] = first_form(model)
    opened.check_model(expected)
    check_room(conversation, opened.end, opened.path)
    snapshots = opened.snapshots(pool.caches)
    with faults_of(opened.path):
        check_forms(pool, snapshots)
        check_shift(conversation, snapshots)
        head = _decode_head(opened.options.get(_HEAD), opened.arrays, pool)
        pool.restore(conversation.sequence, snapshots)
    conversation.head = head


def check_room(conversation: Conversation, end: int, path: Path) -> None:
    """Raise CacheFullError where a file is for more tokens than the conversation may hold."""
    capacity = conversation.limits.capacity
    if capacity is not None and end > capacity:
        raise CacheFullError(end, capacity, capacity, f"so many are in {path}")


def check_forms(pool: Pool, snapshots: Sequence[Any]) -> None:
    """Raise ValueError unless snapshots are of just the layers, heads and arrays that the model writes."""
    for kind, _ in pool.positional():
        snapshot = snapshots[kind]
        if not snapshot.runs:
            continue
        for leaf in pool.leaves:
            expected = pool.forms.get(leaf.index) if pool.kinds[leaf.index] == kind else None
            found = snapshot.forms.get(leaf.index)
            if (expected and expected[:3]) != (found and found[:3]):
                raise ValueError(
                    f"layer {leaf.name} has (heads, features of keys, of values) "
                    f"{found and found[:3]}, the model's has {expected and expected[:3]}"
                )
    for leaf in pool.leaves:
        stream = None if leaf.rule else snapshots[pool.kinds[leaf.index]]
        for state in stream.states.values() if stream else ():
            arrays = state.get(leaf.index)
            if arrays is not None and len(arrays) != leaf.slots:
                raise ValueError(f"layer {leaf.name} has {len(arrays)} arrays, the model's has {leaf.slots}")


def check_shift(conversation: Conversation, snapshots: Sequence[Any]) -> None:
    """Raise ValueError where a window has forgotten tokens that come into its sight with the first shift."""
    capacity, overflow, sinks, _ = conversation.limits
    if overflow != "shift" or capacity is None:
        return
    sinks = min(sinks, capacity)
    drop = max(1, (capacity - sinks) // 2)
    for kind, cache in conversation.pool.positional():
        rule, (end, runs, _) = cache._rule, snapshots[kind]
        if not isinstance(rule, Window):
            continue
        after = capacity - drop
        seen = {*range(min(rule.sinks, after)), *range(max(0, rule.lower(after)), after)}
        needed = {p if p < sinks else p + drop for p in seen}
        held = {p for run in runs for p in range(run.begin, run.begin + run.length)}
        if missing := {p for p in needed if p < end} - held:
            raise ValueError(
                f"a window of {rule.size} tokens no longer holds tokens {min(missing)} to {max(missing)}, "
                f"which a cache of capacity={capacity} needs when it shifts; load it with a capacity of more "
                f'than {4 * rule.size} tokens, or with overflow="error"'
            )


def _encode_head(head: Head, arrays: dict[str, mx.array]) -> dict[str, Any]:
    pieces: list[dict[str, Any]] = []
    for kind, own in head.pieces.items():
        for piece in own:
            lanes = []
            for (leaf, slot), lane in piece.lanes.items():
                encode_lane(lane, arrays, f"{_HEAD}.{len(pieces)}.{leaf}.{slot}")
                lanes.append([leaf, slot, lane.codec if isinstance(lane, Packed) else None])
            pieces.append({"kind": kind, "span": [piece.begin, piece.end, piece.lead], "lanes": lanes})
    return {"lead": head.lead, "pieces": pieces}


def _decode_head(told: Any, arrays: Mapping[str, mx.array], pool: Pool) -> Head:
    if told is None:
        return Head()
    head = mapping(told, "the head")
    pieces: dict[int, tuple[Piece, ...]] = {}
    for index, each in enumerate(listing(head.get("pieces"), "the pieces")):
        piece = mapping(each, "a piece")
        span = listing(piece.get("span"), "the span of a piece", 3)
        begin, end, lead = (integer(number, "the span of a piece") for number in span)
        kind = integer(piece.get("kind"), "the kind of a piece", 0, len(pool.caches) - 1)
        lanes: dict[tuple[int, Slot], Lane] = {}
        for lane in listing(piece.get("lanes"), "the lanes"):
            leaf, slot, codec = listing(lane, "a lane", 3)
            which = integer(leaf, "a leaf"), _slot(slot)
            name = f"{_HEAD}.{index}.{leaf}.{slot}"
            lanes[which] = _decode_lane(pool.forms.get(which[0]), which[1], end - begin, arrays, name, codec)
        pieces[kind] = (*pieces.get(kind, ()), Piece(begin, end, lead, lanes))
    return Head(integer(head.get("lead"), "the lead"), pieces)


def _decode_lane(
    form: Form | None, slot: Slot, length: int, arrays: Mapping[str, mx.array], name: str, codec: Any
) -> Lane:
    if form is None:
        raise ValueError(f"{name} is of a layer that holds no keys and values")
    dims, dtypes = (form.key_dim, form.value_dim), (form.key_dtype, form.value_dtype)
    return decode_lane(arrays, name, (form.heads, length, dims[slot]), dtypes[slot], decode_codec(codec))


def _slot(value: Any) -> Slot:
    if value not in (0, 1):
        raise ValueError(f"{value} is neither keys nor values")
    return 1 if value else 0
