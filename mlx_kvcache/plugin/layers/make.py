"""Making the entries of a cache list."""

from __future__ import annotations

from typing import Any

from ...cells.rules import Causal, Chunk, Window
from ..layout import Entry, Leaf
from ..rows import Rows
from .arrays import ArraysCache
from .base import Layer
from .keyvalue import ChunkedKVCache, KVCache, RotatingKVCache
from .nested import CacheList

_CLASSES: dict[type, type[Layer]] = {
    Causal: KVCache,
    Window: RotatingKVCache,
    Chunk: ChunkedKVCache,
    type(None): ArraysCache,
}


def entries_of(rows: Rows) -> list[Any]:
    """One object for each entry of the model's cache list."""
    return [_entry(rows, entry) for entry in rows.pool.layout.entries]


def _entry(rows: Rows, entry: Entry) -> Any:
    if isinstance(entry, Leaf):
        return _CLASSES[type(entry.rule)](rows, entry)
    return CacheList(*(_entry(rows, child) for child in entry))
