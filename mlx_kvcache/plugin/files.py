"""Saves conversations to files and loads them, in the format of this package and in that of mlx-lm.

`prepared` copies a conversation for writing, `loaded` makes one from a file of either format, and
`save_for_mlx_lm` writes a cache list that mlx-lm can load. Ranks of a group write one file each; the file's
name and header say which rank it belongs to.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..caches import recurrent
from ..caches.snapshot import Run, Snapshot
from ..cells.visibility import Chunk, Rule, Window
from ..errors import CacheError, CacheFileError, CacheFullError, NotSupportedError
from ..persist.atomic import replacing
from ..persist.container import NotOursError, accessing, faults_of
from ..persist.files import Base, Opened, Prepared, evaluate, open_file, prepare
from ..persist.schema import (
    LARGEST,
    decode_codec,
    decode_lane,
    encode_codec,
    encode_lane,
    integer,
    listing,
    mapping,
)
from ..storage.buffers import Form, Lanes
from ..storage.codec import Lane, Packed, Plain, index_of
from .cache_options import Storage, by_layer, new_conversation, options_of
from .entries.keyvalue import QuantizedKVCache
from .forward.batch_rows import Rows
from .hosts.layout import Leaf
from .hosts.mlx_lm import MLX_LM
from .hosts.mlx_lm_files import Entry, Foreign, read_foreign
from .hosts.observe import Observable
from .pool.conversation import Conversation, Limits
from .pool.pool import Pool
from .pool.weights import fingerprint, first_form, is_first_form, version_of
from .ranks import ALONE, Ranks, ranks_of
from .rope.axes import NO_DELTAS, Deltas
from .rope.rebase import Head, Piece, Slot

_RANKS = "ranks"
_NAMED = re.compile(r"\.rank\d+of\d+(\.[^.]*)?")


def path_of(path: Path, ranks: Ranks) -> Path:
    """Returns the path of this rank's file, such as `chat.rank0of2.safetensors` for `chat.safetensors`."""
    if ranks.is_alone:
        return path
    if _NAMED.search(path.name):
        raise CacheFileError(path, "this is the file of one rank: give all ranks the path without .rankNofM")
    return path.with_name(f"{path.stem}.rank{ranks.rank}of{ranks.size}{path.suffix}")


def write(ranks: Ranks, path: Path, prepare: Callable[[], Prepared]) -> None:
    """Writes the files of all ranks, or leaves all existing files as they are.

    Each rank writes a temporary file beside its own and tells the others once it is on disk. Then each
    renames its file. If a machine crashes or a rename fails in between, some ranks have the new file and
    others the old one. `load` detects this by the name of the save, which is random and the same in all
    its files.

    Raises CacheFileError if this rank cannot write its file, and RanksDisagreeError if another cannot.
    """
    ranks.agree(f"save {path.name}")
    with ranks.together(f"copy the cache for {path.name}"):
        own = path_of(path, ranks)
        prepared = prepare()
    name = ranks.share("name the save", secrets.token_hex(8))[0]
    prepared.header["options"][_RANKS] = {"rank": ranks.rank, "size": ranks.size, "save": name}
    failure: CacheFileError | None = None
    is_written = False

    def ready() -> None:
        nonlocal is_written
        ranks.ready()
        is_written = True

    with ranks.together(f"write {path.name}"):
        try:
            prepared.write(own, ready)
        except CacheFileError as error:
            if not is_written:
                raise
            failure = error
    with ranks.together(f"replace {path.name}"):
        if failure:
            raise failure


def _check_rank(opened: Opened, ranks: Ranks) -> str:
    """Returns the name of the save that a file belongs to. Raises CacheFileError if it is of another rank."""
    with faults_of(opened.path):
        told: Mapping[str, Any] = mapping(opened.options.get(_RANKS, {}), "option ranks")
        rank, size = integer(told.get("rank", 0), "rank"), integer(told.get("size", 1), "number of ranks")
        if (rank, size) != (ranks.rank, ranks.size):
            raise ValueError(
                f"belongs to rank {rank} of {size}, but this is rank {ranks.rank} of {ranks.size}"
            )
    return str(told.get("save"))


_HEAD = "head"
_WRITTEN = {"quantize_after": "quantise_after"}
"""Options that have another name in files."""


def prepared(
    conversation: Conversation,
    tokens: Sequence[int] | None = None,
    tokenizer: Any = None,
    base: Base | None = None,
) -> Prepared:
    """Copies a conversation so that it can be written to a file.

    Leaves out the tokens that a base holds, unless positions run ahead of those in other files.

    Raises CacheError if the model's weights have changed, and the errors of `prepare`.
    """
    conversation.check_open()
    pool = conversation.pool
    if pool.version is not version_of(pool.living_model):
        raise CacheError(
            "cannot save: the model's weights have changed since this cache was made; make a new cache and "
            "compute its tokens again"
        )
    extra: dict[str, mx.array] = {}
    options = {_WRITTEN.get(name, name): value for name, value in options_of(conversation).items()}
    options[_HEAD] = _encode_head(conversation.head, extra)
    model = fingerprint(pool.living_model, tokenizer)
    if conversation.head != Head():
        base = None
    return prepare(pool.caches, conversation.sequence, tokens, model, options, extra, base)


def _restore(conversation: Conversation, opened: Opened, tokenizer: Any) -> None:
    """Fills an empty conversation from a file of ours."""
    pool = conversation.pool
    model = pool.living_model
    expected = fingerprint(model, tokenizer)
    if is_first_form(opened.model.get("weights")):
        expected["weights"] = first_form(model)
    opened.check_model(expected)
    _check_room(conversation, opened.end, opened.path)
    snapshots = opened.snapshots(pool.caches)
    with faults_of(opened.path):
        before = opened.base
        while before:
            file, _ = before
            if _decode_head(file.options.get(_HEAD), file.arrays, pool) != Head():
                raise ValueError(f"{file.path.name} has its tokens at other positions")
            before = file.base
        head = _decode_head(opened.options.get(_HEAD), opened.arrays, pool)
        _fill(conversation, snapshots)
    conversation.head = head


def _check_room(conversation: Conversation, end: int, path: Path) -> None:
    """Raises CacheFullError if a file holds more tokens than the capacity."""
    capacity = conversation.limits.capacity
    if capacity is not None and end > capacity:
        raise CacheFullError(end, capacity, capacity, f"{path} holds {end} tokens")


def _fill(conversation: Conversation, snapshots: Sequence[Any]) -> None:
    """Restores snapshots, one for each cache of the pool. Raises ValueError if they do not fit."""
    _check_forms(conversation.pool, snapshots)
    _check_shift(conversation, snapshots)
    conversation.pool.restore(conversation.sequence, snapshots)


def _check_forms(pool: Pool, snapshots: Sequence[Any]) -> None:
    """Raises ValueError unless snapshots have the layers, dimensions and arrays that the model writes."""
    for kind, _ in pool.positional():
        snapshot = snapshots[kind]
        if not snapshot.runs:
            continue
        for leaf in pool.leaves:
            expected = pool.forms.get(leaf.index) if pool.kinds[leaf.index] == kind else None
            found = snapshot.forms.get(leaf.index)
            if (expected and expected[:3]) != (found and found[:3]):
                raise ValueError(
                    f"layer {leaf.name} has (heads, key dim, value dim) {found and found[:3]}, "
                    f"the model's has {expected and expected[:3]}"
                )
    for leaf in pool.leaves:
        stream = None if leaf.rule else snapshots[pool.kinds[leaf.index]]
        for state in stream.states.values() if stream else ():
            arrays = state.get(leaf.index)
            if arrays is not None and len(arrays) != leaf.slots:
                raise ValueError(f"layer {leaf.name} has {len(arrays)} arrays, the model's has {leaf.slots}")


def _check_shift(conversation: Conversation, snapshots: Sequence[Any]) -> None:
    """Raises ValueError if a window does not hold all tokens that it will see after the first shift."""
    capacity, overflow, sinks, *_ = conversation.limits
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
                f"which a cache of capacity={capacity} needs when it shifts; load it with a capacity above "
                f'{4 * rule.size} tokens, or with overflow="error"'
            )


def _encode_head(head: Head, arrays: dict[str, mx.array]) -> dict[str, Any]:
    pieces: list[dict[str, Any]] = []
    for kind, own in head.pieces.items():
        for piece in own:
            lanes = []
            for (leaf, slot), lane in piece.lanes.items():
                encode_lane(lane, arrays, f"{_HEAD}.{len(pieces)}.{leaf}.{slot}")
                codec = encode_codec(lane.codec) if isinstance(lane, Packed) else None
                lanes.append([leaf, slot, codec])
            pieces.append({"kind": kind, "span": [piece.begin, piece.end, piece.lead], "lanes": lanes})
    deltas = {"steps": head.deltas.steps, "inside": head.deltas.inside} if head.deltas != NO_DELTAS else None
    return {"lead": head.lead, "pieces": pieces} | ({"deltas": deltas} if deltas else {})


def _decode_head(told: Any, arrays: Mapping[str, mx.array], pool: Pool) -> Head:
    if told is None:
        return Head()
    head = mapping(told, "head")
    pieces: dict[int, tuple[Piece, ...]] = {}
    for index, each in enumerate(listing(head.get("pieces"), "head.pieces")):
        piece = mapping(each, "a piece of the head")
        span = listing(piece.get("span"), "span of a piece", 3)
        begin, end, lead = (integer(number, "span of a piece") for number in span)
        kind = integer(piece.get("kind"), "kind of a piece", 0, len(pool.caches) - 1)
        lanes: dict[tuple[int, Slot], Lane] = {}
        for lane in listing(piece.get("lanes"), "lanes of a piece"):
            leaf, slot, codec = listing(lane, "a lane of a piece", 3)
            form = pool.forms.get(integer(leaf, "leaf of a lane"))
            if form is None:
                raise ValueError(f"a piece of the head belongs to layer {leaf}, which has no keys and values")
            own: Slot = 1 if integer(slot, "slot of a lane", 0, 1) else 0
            heads, dims, dtypes = form.heads, form[1:3], form[3:5]
            name, size = f"{_HEAD}.{index}.{leaf}.{slot}", (heads, end - begin, dims[own])
            lanes[leaf, own] = decode_lane(arrays, name, size, dtypes[own], decode_codec(codec))
        pieces[kind] = (*pieces.get(kind, ()), Piece(begin, end, lead, lanes))
    return Head(integer(head.get("lead"), "head.lead"), pieces, _decode_deltas(head.get("deltas")))


def _decode_deltas(told: Any) -> Deltas:
    """Reads how far positions are from offsets because of pictures; files without pictures have none."""
    if told is None:
        return NO_DELTAS
    steps = []
    for step in listing(mapping(told, "deltas").get("steps"), "deltas.steps"):
        tokens, delta = listing(step, "a step of deltas")
        steps.append((integer(tokens, "tokens of a step"), integer(delta, "a delta", low=-LARGEST)))
    inside = [integer(tokens, "deltas.inside") for tokens in listing(told.get("inside"), "deltas.inside")]
    for numbers in ([tokens for tokens, _ in steps], inside):
        if numbers != sorted(set(numbers)):
            raise ValueError("corrupt file: the positions of pictures are not in order")
    return Deltas(tuple(steps), tuple(inside))


def _adopt(conversation: Conversation, foreign: Foreign) -> None:
    """Fills an empty conversation from a file of mlx-lm."""
    pool = conversation.pool
    _check_room(conversation, foreign.end, foreign.path)
    with faults_of(foreign.path):
        if len(foreign.entries) != len(pool.leaves):
            raise ValueError(
                f"belongs to another model: the file has {len(foreign.entries)} layers, "
                f"the model {len(pool.leaves)}"
            )
        pairs = list(zip(pool.leaves, foreign.entries, strict=True))
        for leaf, entry in pairs:
            found, expected = _kind(entry.name, *entry.sizes), _kind_of(leaf.rule)
            if found != expected:
                raise ValueError(
                    f"belongs to another model: layer {leaf.name} is {found} in the file "
                    f"and {expected} in the model"
                )
        snapshots = [
            _snapshot([pair for pair in pairs if pool.kinds[pair[0].index] == kind], foreign.end, pool)
            for kind in range(len(pool.caches))
        ]
        _fill(conversation, snapshots)


def _kind(name: str, *sizes: int) -> str:
    return f"{name}({', '.join(map(str, sizes))})"


def _kind_of(rule: Rule | None) -> str:
    """Returns mlx-lm's class for a rule, with its sizes."""
    if rule is None:
        return _kind("ArraysCache")
    if isinstance(rule, Window):
        return _kind("RotatingKVCache", rule.size + rule.sinks, rule.sinks)
    return _kind("ChunkedKVCache", rule.size) if isinstance(rule, Chunk) else _kind("KVCache")


def _snapshot(pairs: Sequence[tuple[Leaf, Entry]], end: int, pool: Pool) -> Any:
    """Builds the snapshot of one of the pool's caches from the layers of a file."""
    if pairs[0][0].rule is None:
        state = {leaf.index: entry.arrays for leaf, entry in pairs}
        return recurrent.Stream(end, {end: state}, True) if end else None
    # The model has cache entries that it never writes; they are empty in the file, too.
    written = [(leaf, entry) for leaf, entry in pairs if leaf.index in pool.forms]
    if not written:
        return Snapshot(end, (), {})
    ranges = {entry.ranges for _, entry in written}
    if len(ranges) != 1:
        raise ValueError(f"layers of one kind hold different tokens, as (begin, length): {sorted(ranges)}")
    forms = {leaf.index: _form(pool.forms[leaf.index], entry.lanes) for leaf, entry in written if entry.lanes}
    runs, at = [], 0
    for begin, length in ranges.pop():
        index = index_of(at, at + length)
        layers = {
            leaf.index: (entry.lanes[0].at(index), entry.lanes[1].at(index))
            for leaf, entry in written
            if entry.lanes
        }
        runs.append(Run(begin, length, layers))
        at += length
    return Snapshot(end, tuple(runs), forms)


def _form(expected: Form | None, lanes: Lanes) -> Form:
    """Returns the form of a layer's lanes. Quantized lanes get the dtypes of the model's."""
    assert expected is not None
    own = zip(lanes, (expected.key_dtype, expected.value_dtype), strict=True)
    dtypes = [lane.array.dtype if isinstance(lane, Plain) else dtype for lane, dtype in own]
    if not all(mx.issubdtype(dtype, mx.floating) for dtype in dtypes):
        raise ValueError(f"keys are {dtypes[0]} and values {dtypes[1]}, expected floats")
    keys, values = lanes
    return Form(keys.arrays[0].shape[1], keys.dim, values.dim, dtypes[0], dtypes[1])


def loaded(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    verify: bool,
    options: Mapping[str, Any],
    lazy: bool = False,
) -> tuple[Rows, Opened | None]:
    """Makes a conversation from a file of either format. Raises as `PromptCache.load`.

    Args:
        options: replace the options that were saved in the file.
        lazy: read each array when it is first used. Only the thread that loaded it can then use the cache.

    Returns:
        The conversation, and the opened file, or None for a file of mlx-lm.
    """
    own = {name: value for name, value in options.items() if name != "group"}
    ranks = ranks_of(options.get("group"))
    try:
        with ranks.together(f"load {path.name}"):
            opened = open_file(path_of(path, ranks), verify, lazy)
            save, chosen = _check_rank(opened, ranks), _chosen(_saved_options(opened), own)
    except NotOursError:
        if not ranks.is_alone:
            raise
        return _loaded_from_mlx_lm(path, model, own), None
    # All files must come from one save.
    ranks.agree(f"load {opened.end} tokens of save {save}")
    # Options that the caller gave are not the file's fault.
    blamed = nullcontext() if own else faults_of(opened.path, NotSupportedError)
    with ranks.together(f"make a cache for {path.name}"), blamed:
        rows = _made(model, chosen, ranks)
    with rows.edit(f"restore {path.name}"):
        _restore(rows.conversation, opened, tokenizer)
        if not lazy:
            evaluate(rows.pool.caches, rows.conversation.sequence)
    return rows, opened


def _loaded_from_mlx_lm(path: Path, model: nn.Module, options: Mapping[str, Any]) -> Rows:
    """Makes a conversation from a file of mlx-lm, quantized as the file is if no option says otherwise."""
    foreign = read_foreign(path)
    lanes = (lane for entry in foreign.entries for lane in entry.lanes or ())
    codec = next((lane.codec for lane in lanes if isinstance(lane, Packed)), None)
    saved: dict[str, Any] = {}
    if codec:
        saved = {"kv_bits": codec.bits, "kv_group_size": codec.group_size, "kv_transform": codec.transform}
    rows = _made(model, _merged(saved, options))
    with rows.edit(f"load {path.name}"):
        _adopt(rows.conversation, foreign)
        evaluate(rows.pool.caches, rows.conversation.sequence)
    return rows


_OF_WIDTHS = "kv_transform", "kv_text", "kv_recent"
_NUMBERS = [name for name in Limits._fields if name != "overflow"]


def _saved_options(opened: Opened) -> dict[str, Any]:
    """Returns the options that a file was saved with. Raises CacheFileError if they are malformed."""
    told = opened.options
    with faults_of(opened.path):
        options: dict[str, Any] = {"overflow": told.get("overflow")}
        if "checkpoint_bytes" in told:
            options["checkpoint_bytes"] = None
        for name in (*_NUMBERS, "kv_group_size", "quantize_after"):
            written = told.get(_WRITTEN.get(name, name))
            if written is not None:
                options[name] = integer(written, name)
        if told.get("kv_bits") is not None:
            bits = listing(told["kv_bits"], "kv_bits")
            options["kv_bits"] = by_layer([own and listing(own, "bits of a layer", 2) for own in bits])
            # Files of version 1, and of widths without a transform, do not name one.
            options["kv_transform"] = told.get("kv_transform", "none")
            text = listing(told.get("kv_text", []), "kv_text")
            options["kv_text"] = [integer(token, "a token of kv_text") for token in text]
            options["kv_recent"] = integer(told.get("kv_recent", 0), "kv_recent")
    return options


def _chosen(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merges given options over saved ones, and drops saved ones that need an option that was replaced."""
    options = _merged(saved, given)
    if options.get("capacity") is None and saved.get("overflow") == "shift" and "overflow" not in given:
        options["overflow"] = "error"
    if options["overflow"] == "error" and "sinks" not in given:
        options["sinks"] = 0
    return options


def _merged(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merges given options over saved ones. Some saved ones belong to the saved widths."""
    if "kv_bits" in given:
        saved = {name: saved[name] for name in saved if name not in _OF_WIDTHS}
    return {**saved, **given}


def _made(model: nn.Module, options: Mapping[str, Any], ranks: Ranks = ALONE) -> Rows:
    limits = {name: value for name, value in options.items() if name in Limits._fields}
    storage = {name: value for name, value in options.items() if name not in Limits._fields}
    return alone(new_conversation(model, Limits(**limits), Storage(**storage), ranks))


def alone(conversation: Conversation) -> Rows:
    """Returns the rows of an input that has this conversation as its only row."""
    return Rows(conversation.pool, [conversation], is_batch=False)


def save_for_mlx_lm(path: Path, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a cache list, with entries of ours or of mlx-lm, in mlx-lm's format.

    Raises:
        CacheFileError: the file cannot be written.
        NotSupportedError: mlx-lm is not installed, or its version cannot read such a file.
    """
    if not MLX_LM.is_installed:
        raise NotSupportedError(f"cannot write {path} in mlx-lm's format: mlx-lm is not installed")
    entries = [_stand_in(entry) if isinstance(entry, Observable) else entry for entry in cache]
    with accessing(path, "written"), replacing(path) as file:
        # MLX gets an open file: it would choose the format of a path by its suffix, or add one.
        MLX_LM.caches.save_prompt_cache(file, entries, metadata or {})


def _stand_in(entry: Any) -> Any:
    """Returns an object with what mlx-lm writes for an entry: the name of its class and its state."""
    name, state = _state(entry)
    return type(
        name, (), {"state": MLX_LM.state(name, state), "meta_state": MLX_LM.meta_state(name, state)}
    )()


def _state(entry: Any) -> tuple[str, Any]:
    """Returns the class name and the state of mlx-lm 0.32 for an entry."""
    children = getattr(entry, "caches", None)
    if children is not None:
        states = [_state(child) for child in children]
        return "CacheList", [(state, name) for name, state in states]
    if not getattr(entry, "is_packed", False):
        return type(entry).__name__, entry.saved_state
    # Many models of mlx-lm cannot use its QuantizedKVCache, so quantized full attention becomes a KVCache.
    name = "KVCache" if isinstance(entry, QuantizedKVCache) else type(entry).__name__
    return name, entry.plain_state
