"""A folder in which files are gone, damaged or cannot be written."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_kvcache.errors import CacheFileError
from tests.persist.filing import (
    SIZE,
    check_all,
    folder_at,
    lengths,
    put,
    sequences,
    writer,
)


def test_files_that_are_gone(tmp_path: Path) -> None:
    with folder_at(tmp_path) as folder:
        for token in (1, 2):
            put(folder, [token])
        folder.flush()
        one, two = (found for token in (1, 2) for _, found in folder.matches([token], None))
        one.path.unlink()
        two.path.unlink()
        folder.discard(one)
        folder.discard(one)
        folder.touch(one)
        assert not lengths(folder, [1]) and lengths(folder, [2])
        assert put(folder, [1])
        folder.flush()
        folder.discard(one)
        assert lengths(folder, [1])
    assert check_all(tmp_path) == {(1,)}


def spoil_header(path: Path) -> None:
    path.write_bytes(b"no database" * 100)


def spoil_pages(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def take_away(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [spoil_header, spoil_pages, cut_off, take_away])
def test_a_damaged_index_is_begun_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    with folder_at(tmp_path) as folder:
        for tokens in sequences(0, 20):
            put(folder, tokens)
    mine = tmp_path / "mine.kvcache"
    mine.write_bytes(b"a user's own")
    spoil(tmp_path / "index.sqlite")
    with folder_at(tmp_path) as folder:
        assert folder.nbytes == 0
        assert list(tmp_path.glob("*.kvcache")) == [mine]
        put(folder, [1])
    mine.unlink()
    assert (tmp_path / "index.sqlite.damaged").exists() == (spoil is not take_away)
    (tmp_path / "index.sqlite.damaged").unlink(missing_ok=True)
    assert check_all(tmp_path) == {(1,)}


def test_an_index_that_is_replaced_in_use(tmp_path: Path) -> None:
    """The one who used the old index goes on with the new one, and loses only what it was writing."""
    started, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> int:
        started.set()
        go_on.wait()
        return writer([2])(path)

    with folder_at(tmp_path) as old:
        put(old, [1])
        old.flush()
        assert lengths(old, [1])
        old.put([2], None, slow, SIZE)
        started.wait()
        connection = sqlite3.connect(tmp_path / "index.sqlite")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        spoil_header(tmp_path / "index.sqlite")
        with folder_at(tmp_path) as new:
            put(new, [3])
            new.flush()
            go_on.set()
            old.flush()
            assert old.counts["failed: the index was replaced meanwhile"] == 1
            assert [lengths(old, [token]) for token in (1, 2)] == [[], []]
            assert lengths(old, [3])
            put(old, [4])
            old.flush()
            assert lengths(new, [4])
    (tmp_path / "index.sqlite.damaged").unlink()
    assert check_all(tmp_path) == {(3,), (4,)}


def test_damage_that_shows_in_use(tmp_path: Path) -> None:
    with folder_at(tmp_path) as folder:
        for tokens in sequences(0, 20):
            put(folder, tokens)
    with folder_at(tmp_path) as folder:
        # As if another thread had it: the next one reads the file afresh.
        folder._index._database._idle.clear()
        spoil_pages(tmp_path / "index.sqlite")
        with pytest.raises(CacheFileError, match=str(tmp_path)):
            lengths(folder, [0])
        assert lengths(folder, [0]) == []
        put(folder, [1])
    (tmp_path / "index.sqlite.damaged").unlink()
    assert check_all(tmp_path) == {(1,)}


def test_a_later_version_is_left_alone(tmp_path: Path) -> None:
    with folder_at(tmp_path) as folder:
        put(folder, [1])
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(
        CacheFileError, match=r"index.sqlite: index version 2 is newer than 1; update mlx_kvcache"
    ):
        folder_at(tmp_path)
    assert len(list(tmp_path.glob("*.kvcache"))) == 1


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheFileError, match=str(place)):
            folder_at(place)
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(CacheFileError, match=str(tmp_path)):
        folder_at(tmp_path)
    with pytest.raises(ValueError, match="max_bytes"):
        folder_at(tmp_path, -1)
    with pytest.raises(ValueError, match="max_pending"):
        folder_at(tmp_path, max_pending=-1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_that_cannot_be_written(tmp_path: Path, is_new: bool) -> None:
    if not is_new:
        folder_at(tmp_path).close()
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CacheFileError, match=str(tmp_path)):
            folder_at(tmp_path)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("error", [CacheFileError("x", "full"), ZeroDivisionError(), SystemExit()])
def test_failures_are_counted_and_the_next_is_written(tmp_path: Path, error: BaseException) -> None:
    def fail(path: Path) -> int:
        raise error

    with folder_at(tmp_path) as folder:
        assert folder.put([1], None, fail, SIZE)
        put(folder, [2])
        folder.flush()
        assert folder.counts == {f"failed: {type(error).__name__}": 1, "written": 1}
        assert folder.last_failure == f"{type(error).__name__}: {error}"
        assert put(folder, [1])
    assert check_all(tmp_path) == {(1,), (2,)}


def test_many_failures_are_few_counts(tmp_path: Path) -> None:
    """Messages name files and sizes; what went wrong is counted by its kind."""

    def fail(error: Exception, cause: Exception | None = None) -> Callable[[Path], int]:
        def write(path: Path) -> int:
            raise error from cause

        return write

    full = OSError(errno.ENOSPC, "No space left on device", "name")
    with folder_at(tmp_path) as folder:
        for i in range(20):
            for j, error in enumerate((
                fail(CacheFileError(f"{i}.kvcache", f"cannot be written ({i} bytes): full"), full),
                fail(OSError(errno.ENOSPC, f"No space left for {i}", f"{i}.kvcache")),
                fail(CacheFileError(f"{i}.kvcache", f"the header takes {i} bytes")),
                fail(OSError(f"odd {i}")),
                fail(ValueError(f"number {i}")),
                lambda path: SIZE * 100_000_000,
            )):  # fmt: skip
                assert folder.put([i, j], None, error, SIZE)
        folder.flush()
        assert folder.counts == {
            f"failed: {os.strerror(errno.ENOSPC)}": 40,
            "failed: CacheFileError": 20,
            "failed: OSError": 20,
            "failed: ValueError": 20,
            "failed: larger than the budget": 20,
        }
        assert folder.last_failure.endswith("larger than the budget")


def test_nothing_is_left_of_salts_whose_files_are_gone(tmp_path: Path) -> None:
    with folder_at(tmp_path, 3 * SIZE) as folder:
        for salt in range(30):
            put(folder, [1, salt], salt)
            folder.flush()
            assert lengths(folder, [1], salt)
        assert len(folder._names) == len(folder._known) == 3
        folder.discard(next(iter(folder.matches([1], 29)))[1])
        assert not lengths(folder, [1], 29)
        assert len(folder._names) == 2
