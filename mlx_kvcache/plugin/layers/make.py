"""Making the entries of a cache list."""

from __future__ import annotations

from typing import Any

from ..layout import Entry, Leaf
from ..rows import Rows
from .arrays import ArraysCache
from .keyvalue import layer_of
from .nested import CacheList


def entries_of(rows: Rows) -> list[Any]:
    """One object for each entry of the model's cache list."""
    return [_entry(rows, entry) for entry in rows.pool.layout.entries]


def _entry(rows: Rows, entry: Entry) -> Any:
    if isinstance(entry, Leaf):
        return layer_of(rows, entry) if entry.rule else ArraysCache(rows, entry)
    return CacheList(*(_entry(rows, child) for child in entry))
