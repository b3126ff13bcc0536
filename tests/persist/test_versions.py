"""Formats change only with their version, and files of all versions so far are read."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvcache.persist import load
from mlx_kvcache.persist.container import read_contents
from mlx_kvcache.persist.disk_cache import PrefixFolder
from mlx_kvcache.persist.header import VERSION
from mlx_kvcache.persist.index import VERSION as TABLES_VERSION

from .golden import FOLDER, MODEL, TOKENS, empty, feed, filled, place, write

VERSIONS = sorted(re.findall(r"version_(\d+)", " ".join(path.name for path in FOLDER.iterdir())))

TABLES = {
    1: """
        entries: name TEXT, digest TEXT, namespace TEXT, salt TEXT, nbytes INTEGER, used INTEGER,
            is_ready INTEGER, tokens BLOB
        state: stamp INTEGER
    """
}
"""The columns of a folder's index, by the version that it says of itself."""


def test_there_is_a_file_of_the_present_version() -> None:
    assert VERSION in VERSIONS


def test_what_is_written_is_as_the_version_says(tmp_path: Path) -> None:
    """The same keys in the header, the same arrays: else VERSION is to be another, with a file of its own."""
    write(tmp_path / "now")
    now, then = read_contents(tmp_path / "now"), read_contents(place(VERSION))
    assert now.header == then.header
    described = [
        {name: (entry.dtype, entry.shape) for name, entry in contents.entries.items()}
        for contents in (now, then)
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_every_version_are_read(version: str) -> None:
    cache, expected = empty(), filled()
    opened = load(place(version), cache, 0, MODEL)
    assert (opened.end, opened.tokens, opened.model) == (len(TOKENS), list(TOKENS), MODEL)
    for position in range(len(TOKENS) + 2):
        assert cache.can_resume(0, position) == expected.can_resume(0, position), position
    for ours, theirs in zip(feed(cache, 1), feed(expected, 1), strict=True):
        assert mx.allclose(ours, theirs, atol=1e-3)


def test_tables_are_as_their_version_says(tmp_path: Path) -> None:
    with PrefixFolder(tmp_path, 1000, "model"):
        pass
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {
        name: ", ".join(f"{row[1]} {row[2]}" for row in connection.execute(f"PRAGMA table_info({name})"))
        for name in sorted(names)
    }
    connection.close()
    told = " ".join(f"{name}: {own}" for name, own in columns.items())
    assert told == " ".join(TABLES[TABLES_VERSION].split())
