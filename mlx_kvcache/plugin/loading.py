"""From a file of either format to a conversation, and to mlx-lm's format from a cache list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..errors import CacheFileError, NotSupportedError
from ..persist.atomic import replacing
from ..persist.checks import integer, listing
from ..persist.container import NotOursError
from ..persist.files import Opened, evaluate, faults_of, open_file
from .adopt import adopt, storage_of
from .conversation import Conversation, Limits
from .files import restore
from .foreign import read_foreign
from .layers.keyvalue import QuantizedKVCache
from .making import Storage, by_layer, new_conversation
from .ranks import ALONE, Ranks, ranks_of
from .rows import Rows
from .shards import check_rank, path_of


def loaded(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    verify: bool,
    options: Mapping[str, Any],
    lazy: bool = False,
) -> tuple[Rows, Opened | None]:
    """What is in a file, made with the file's own options where there are no others. Raises as `load`.

    Args:
        lazy: read an array when it is first needed, which only this thread can.
    """
    own = {name: value for name, value in options.items() if name != "group"}
    ranks = ranks_of(options.get("group"))
    if not ranks.is_alone:
        return _loaded_together(path, model, tokenizer, verify, own, ranks)
    try:
        opened = open_file(path, verify, lazy)
    except NotOursError:
        foreign = read_foreign(path)
        rows = _made(model, storage_of(foreign) | own)
        with rows.edit(f"adopt {path.name}"):
            adopt(rows.conversation, foreign)
            _evaluate(rows)
        return rows, None
    check_rank(opened, ranks)
    with _blamed(path, own):
        rows = _made(model, _chosen(_saved_options(opened), own))
    with rows.edit(f"restore {path.name}"):
        restore(rows.conversation, opened, tokenizer)
        if not lazy:
            _evaluate(rows)
    return rows, opened


def _evaluate(rows: Rows) -> None:
    evaluate(rows.pool.caches, rows.conversation.sequence)


def _loaded_together(
    path: Path, model: nn.Module, tokenizer: Any, verify: bool, options: Mapping[str, Any], ranks: Ranks
) -> tuple[Rows, Opened]:
    """What is in the files of all ranks, if each has its own and all are of one save."""
    with ranks.together(f"load {path.name}"):
        opened = open_file(path_of(path, ranks), verify)
        save, chosen = check_rank(opened, ranks), _chosen(_saved_options(opened), options)
    ranks.agree(f"load {opened.end} tokens of save {save}")
    with ranks.together(f"make a cache for {path.name}"), _blamed(opened.path, options):
        rows = _made(model, chosen, ranks)
    with rows.edit(f"restore {path.name}"):
        restore(rows.conversation, opened, tokenizer)
        _evaluate(rows)
    return rows, opened


def _saved_options(opened: Opened) -> dict[str, Any]:
    """Options that a file was saved with. Raises CacheFileError for what cannot be some."""
    told = opened.options
    with faults_of(opened.path):
        options: dict[str, Any] = {"overflow": told.get("overflow")}
        for name in ("capacity", "sinks", "rewind", "kv_group_size", "quantise_after"):
            if told.get(name) is not None:
                options[name] = integer(told[name], name)
        if told.get("kv_bits") is not None:
            bits = listing(told["kv_bits"], "kv_bits")
            options["kv_bits"] = by_layer([own and listing(own, "bits of a layer", 2) for own in bits])
    return options


def _chosen(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given options in the place of saved ones, without what these only have beside others."""
    options = {**saved, **given}
    if options.get("capacity") is None and saved.get("overflow") == "shift" and "overflow" not in given:
        options["overflow"] = "error"
    if options["overflow"] == "error" and "sinks" not in given:
        options["sinks"] = 0
    return options


def _blamed(path: Path, given: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Options that do not suit the model are the file's fault unless some were given."""
    return nullcontext() if given else faults_of(path, NotSupportedError)


def _made(model: nn.Module, options: Mapping[str, Any], ranks: Ranks = ALONE) -> Rows:
    limits = {name: value for name, value in options.items() if name in Limits._fields}
    storage = {name: value for name, value in options.items() if name not in Limits._fields}
    return alone(new_conversation(model, Limits(**limits), Storage(**storage), ranks))


def alone(conversation: Conversation) -> Rows:
    """A conversation as the only row of a model's input."""
    return Rows(conversation.pool, [conversation], is_batch=False)


class _Entry(NamedTuple):
    """What mlx-lm's `save_prompt_cache` asks of a cache."""

    state: Any


def save_for_mlx_lm(path: Path, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Write a cache list, whose entries are ours or mlx-lm's, so that mlx-lm can load it.

    Raises:
        CacheFileError: it cannot be written.
    """
    entries = [_loadable(entry) for entry in cache]
    try:
        with replacing(path) as file:
            # MLX chooses the format by the name, and would add an ending to one that has none.
            mlx_lm_cache.save_prompt_cache(file, entries, metadata)
    except OSError as error:
        raise CacheFileError(path, f"cannot be written: {error.strerror or error}") from error


def _loadable(entry: Any) -> Any:
    """An entry as mlx-lm's class of its name would save it."""
    name, state = _state(entry)
    return type(name, (_Entry,), {})(state)


def _state(entry: Any) -> tuple[str, Any]:
    """The class and the state that mlx-lm is to write."""
    children = getattr(entry, "caches", None)
    if children is not None:
        states = [_state(child) for child in children]
        return "CacheList", [(state, name) for name, state in states]
    if not getattr(entry, "is_packed", False):
        return type(entry).__name__, entry.state
    # Many of mlx-lm's models do not take its quantised cache, of one number of bits on full attention.
    name = "KVCache" if isinstance(entry, QuantizedKVCache) else type(entry).__name__
    return name, entry.plain_state
