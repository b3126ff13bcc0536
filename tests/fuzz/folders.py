"""Folders of files whose index or files are damaged, and calls that nobody meant."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from mlx_kvcache import CacheError
from mlx_kvcache.persist.disk_cache import Found, PrefixFolder

from .bounds import folder
from .target import drawn

NAMESPACE = "model"
KEPT = ((1, 2, 3), (1, 2, 4, 5), (9,))
COLUMNS = ("name", "digest", "namespace", "salt", "nbytes", "used", "is_ready", "tokens")
PRECIOUS = "precious"
"""What lies beside the folder and in it, and is nobody's business."""

cells: st.SearchStrategy[Any] = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.sampled_from((NAMESPACE, "None", "", f"../{PRECIOUS}", PRECIOUS, "/", ".", "a\0b", "x" * 300))
)
tokens = st.lists(st.integers(0, 5), max_size=5) | st.sampled_from(KEPT)
odd: st.SearchStrategy[Any] = (
    tokens
    | st.lists(st.integers() | st.booleans() | st.floats() | st.text(max_size=2), max_size=3)
    | st.none()
    | st.integers()
    | st.text(max_size=3)
    | st.binary(max_size=9)
)
salts: st.SearchStrategy[Any] = (
    st.none()
    | st.sampled_from((0, 1, True, 1.0, "1", b"1", (1, None), ((),), frozenset(), 2**70, float("nan")))
    | st.text(max_size=3)
)


class Call(NamedTuple):
    """A method, and what it is given."""

    name: str
    tokens: Any
    salt: Any
    size: Any


class Damaged(NamedTuple):
    """A folder that is not as it was left."""

    cells: list[tuple[str, int, Any]]
    statements: list[str]
    flips: list[tuple[int, int]]
    cut: int | None
    lost: int
    calls: list[Call]
    max_bytes: Any
    max_pending: Any


STATEMENTS = (
    "DELETE FROM state",
    "INSERT INTO state VALUES ('x')",
    "UPDATE state SET stamp = 'x'",
    "DROP TABLE state",
    "DROP TABLE entries",
    "DELETE FROM entries",
    "DROP TRIGGER removed",
    "PRAGMA user_version = 0",
    "PRAGMA user_version = -1",
    "PRAGMA user_version = 2",
    "CREATE TRIGGER odd BEFORE UPDATE ON entries BEGIN SELECT raise(ABORT, 'odd'); END",
    "ALTER TABLE entries DROP COLUMN used",
    "ALTER TABLE entries ADD COLUMN more",
)

damaged = st.builds(
    Damaged,
    st.lists(st.tuples(st.sampled_from(COLUMNS), st.integers(0, 3), cells), max_size=3),
    st.just([]) | st.lists(st.sampled_from(STATEMENTS), max_size=2),
    st.just([]) | st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(1, 255)), max_size=4),
    st.none() | st.integers(0, 1 << 15),
    st.integers(0, 7),
    st.lists(
        st.builds(
            Call,
            st.sampled_from(("put", "has", "matches", "touch", "discard", "flush", "nbytes")),
            odd,
            salts,
            st.integers(-1, 3000) | st.none() | st.text(max_size=2),
        ),
        max_size=5,
    ),
    st.sampled_from((0, 100, 2000, 10**6, -1)) | st.none() | st.floats(),
    st.sampled_from((0, 10**6, -1)) | st.none(),
)


def write(path: Path) -> int:
    """A file of 600 bytes."""
    path.write_bytes(bytes(600))
    return 600


@cache
def template() -> Path:
    """A folder as it should be."""
    made = folder() / "template"
    with PrefixFolder(made, 10**6, NAMESPACE) as kept:
        for own in KEPT:
            kept.put(own, None, write, 600)
        kept.flush()
    for precious in (made.parent / PRECIOUS, made / PRECIOUS):
        precious.write_bytes(b"mine")
    return made


def check_folder(damaged: Damaged) -> None:
    """It is refused, or answers; what is not its own stays."""
    source, place = template(), folder() / "folder"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    _damage(place, damaged)
    try:
        with PrefixFolder(place, damaged.max_bytes, NAMESPACE, damaged.max_pending) as opened:
            for call in damaged.calls:
                _call(opened, call, place)
            opened.flush()
            assert not [reason for reason in opened.counts if "TypeError" in reason], opened.counts
    except CacheError:
        pass
    except (TypeError, ValueError):
        bounds = damaged.max_bytes, damaged.max_pending
        assert not all(isinstance(bound, int) and bound >= 0 for bound in bounds)
    for precious in (place.parent / PRECIOUS, place / PRECIOUS):
        assert precious.read_bytes() == b"mine"
    # It can be used again, by somebody who asks for nothing odd, or says why not.
    with suppress(CacheError), PrefixFolder(place, 10**6, NAMESPACE) as opened:
        assert opened.put((7, 7), None, write, 600)
        opened.flush()
        assert opened.has((7, 7), None) or any(reason.startswith("failed: ") for reason in opened.counts)


def _damage(place: Path, damaged: Damaged) -> None:
    index = place / "index.sqlite"
    with closing(sqlite3.connect(index, isolation_level=None)) as connection:
        for column, row, value in damaged.cells:
            with suppress(sqlite3.Error):
                connection.execute(
                    f"UPDATE entries SET {column} = ? WHERE rowid = ? + 1",  # noqa: S608
                    (value, row),
                )
        for statement in damaged.statements:
            with suppress(sqlite3.Error):
                connection.execute(statement)
    raw = bytearray(index.read_bytes())
    for at, by in damaged.flips:
        raw[at % len(raw)] ^= by
    if damaged.flips or damaged.cut is not None:
        index.write_bytes(raw[: damaged.cut])
    for number, path in enumerate(sorted(place.glob("*.kvcache"))):
        if damaged.lost & 1 << number:
            path.unlink()


def _call(opened: PrefixFolder, call: Call, place: Path) -> None:
    """One call. A wrong type may be told as such; what is found is of this folder."""
    try:
        if call.name == "put":
            opened.put(call.tokens, call.salt, write, call.size)
        elif call.name == "has":
            assert opened.has(call.tokens, call.salt) in (True, False)
        elif call.name == "matches":
            for common, found in opened.matches(call.tokens, call.salt):
                assert found.path.parent == place and 0 < common <= len(found.tokens)
                assert all(type(token) is int for token in found.tokens)
        elif call.name == "flush":
            opened.flush()
        elif call.name == "nbytes":
            assert isinstance(opened.nbytes, int)
        else:
            found = Found((1,), place / f"{'0' * 32}.kvcache")
            getattr(opened, call.name)(found)
    except (CacheError, ValueError):
        pass
    except TypeError:
        is_tokens = isinstance(call.tokens, (list, tuple)) and all(type(t) is int for t in call.tokens)
        assert not is_tokens or type(call.size) is not int


FOLDER = drawn("folder", "damaged folders of files, and calls on them", damaged, check_folder)
