"""A folder of files by their beginnings: found, bounded, shared by processes, and whole after any end."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_kvcache import CacheError
from mlx_kvcache.errors import CacheFileError
from mlx_kvcache.persist.folder import Found, PrefixFolder
from mlx_kvcache.prefixes import PrefixTree
from tests.persist.filing import ROOT, SIZE, exact, is_whole, put, sequences, writer

PLENTY = 10**9


def folder_at(path: Path, max_bytes: int = PLENTY, namespace: str = "model", **options: Any) -> PrefixFolder:
    return PrefixFolder(path, max_bytes, namespace, **options)


def child(path: Path, action: str, argument: object, budget: int = PLENTY) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.persist.filing", str(path), str(budget), action, str(argument)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lengths(
    folder: PrefixFolder, tokens: Sequence[int], salt: Hashable = None
) -> list[tuple[int, tuple[int, ...]]]:
    return [(length, found.tokens) for length, found in folder.matches(tokens, salt)]


def check_all(path: Path, count: int | None = None) -> set[tuple[int, ...]]:
    """After a new start: each entry's file is there and whole, and nothing else is in the folder."""
    with folder_at(path) as folder:
        entries = [
            Found(folder._index.tokens(name) or (), path / name) for name in folder._index.salts("model")
        ]
        assert all(is_whole(found) and exact(folder, found.tokens) == found for found in entries)
        assert folder.nbytes == SIZE * len(entries)
        assert count is None or len(entries) == count
    assert {entry.name for entry in path.iterdir()} == {
        "index.sqlite",
        *(found.path.name for found in entries),
    }
    return {found.tokens for found in entries}


@pytest.mark.parametrize("seed", range(4))
def test_equals_trees_in_memory(tmp_path: Path, seed: int) -> None:
    """Short tokens of few kinds are put, discarded, looked up through two objects, and kept over restarts."""
    rng = random.Random(seed)
    folders = [folder_at(tmp_path), folder_at(tmp_path)]
    trees: dict[str, PrefixTree[tuple[int, ...]]] = {salt: PrefixTree() for salt in "ab"}
    stored: set[tuple[str, tuple[int, ...]]] = set()
    for _ in range(60):
        which, salt = rng.randrange(2), rng.choice("ab")
        tokens = tuple(rng.choices(range(3), k=rng.randrange(1, 6)))
        action, folder = rng.random(), folders[which]
        if action < 0.5:
            assert put(folder, tokens, salt) == ((salt, tokens) not in stored)
            folder.flush()
            trees[salt].put(tokens, tokens)
            stored.add((salt, tokens))
        elif action < 0.7 and stored:
            salt, tokens = rng.choice(sorted(stored))
            found = exact(folder, tokens, salt)
            assert found and is_whole(found)
            folder.discard(found)
            trees[salt].pop(tokens)
            stored.remove((salt, tokens))
        elif action < 0.75:
            folder.close()
            folders[which] = folder_at(tmp_path)
        for reader in folders:
            ours, theirs = lengths(reader, tokens, salt), list(trees[salt].matches(tokens))
            assert [length for length, _ in ours] == [length for length, _ in theirs]
            assert sorted(ours) == sorted(theirs)
        assert folders[0].nbytes == SIZE * len(stored)
    for folder in folders:
        folder.close()


def test_the_longest_come_first(tmp_path: Path) -> None:
    with folder_at(tmp_path) as folder:
        for tokens in ([1], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9], [7], [2**40, 2**63 - 1]):
            assert put(folder, tokens)
        folder.flush()
        assert lengths(folder, [1, 2, 3, 4]) == [(4, (1, 2, 3, 4, 5)), (3, (1, 2, 3)), (1, (1,))]
        assert lengths(folder, [1, 2, 9, 9]) == [(3, (1, 2, 9)), (1, (1,))]
        assert lengths(folder, [2**40, 5]) == [(1, (2**40, 2**63 - 1))]
        assert lengths(folder, [8]) == lengths(folder, []) == []
        assert folder.counts == {"written": 6}
        for tokens in ([], [1, -1], [2**63]):
            with pytest.raises(ValueError, match=r"token"):
                put(folder, tokens)


def test_salts_and_namespaces_are_apart(tmp_path: Path) -> None:
    salts = [
        None,
        0,
        False,
        0.0,
        "0",
        b"0",
        "",
        b"",
        (),
        (0,),
        (False,),
        ("a", "b"),
        ("a, b",),
        (("a",), "b"),
        "é",
    ]
    with folder_at(tmp_path) as folder:
        for serial, salt in enumerate(salts):
            assert put(folder, [1, serial], salt)
            assert put(folder, [5], salt)
        folder.flush()
    with folder_at(tmp_path) as folder, folder_at(tmp_path, namespace="other") as other:
        for serial, salt in enumerate(salts):
            assert lengths(folder, [1], salt) == [(1, (1, serial))]
            assert lengths(other, [1], salt) == []
        assert put(other, [5])
        other.flush()
        assert lengths(other, [5]) == [(1, (5,))]
        assert folder.nbytes == other.nbytes == SIZE * (2 * len(salts) + 1)
        others: list[Hashable] = [frozenset(), (1, object()), type("Name", (str,), {})("0")]
        for unwritable in others:
            assert not put(folder, [5], unwritable)
            assert lengths(folder, [5], unwritable) == []
        assert folder.counts == {"salt cannot be written": 3}


def test_the_least_recently_used_goes_over_all_objects(tmp_path: Path) -> None:
    with folder_at(tmp_path, 4 * SIZE) as one, folder_at(tmp_path, 4 * SIZE, "other") as other:
        for token in (1, 2, 3):
            put(one, [token])
        one.flush()
        put(other, [1])
        other.flush()
        one.touch(next(iter(one.matches([1], None)))[1])
        assert not put(one, [2])
        one.flush()
        put(other, [2])
        other.flush()
        assert [bool(lengths(one, [token])) for token in (1, 2, 3)] == [True, True, False]
        put(one, [4])
        one.flush()
        assert [bool(lengths(other, [token])) for token in (1, 2)] == [False, True]
        assert one.nbytes == 4 * SIZE
        assert (one.counts["evicted"], other.counts["evicted"], one.counts["already there"]) == (1, 1, 1)
    with folder_at(tmp_path, 2 * SIZE) as smaller:
        assert smaller.nbytes == 2 * SIZE
        assert {tokens for token in (1, 2, 4) for _, tokens in lengths(smaller, [token])} == {(4,)}
    assert len(list(tmp_path.glob("*.kvcache"))) == 2


def test_what_is_larger_than_the_budget_takes_nothing_away(tmp_path: Path) -> None:
    with folder_at(tmp_path, SIZE) as folder:
        put(folder, [1])
        assert not folder.put([2], None, writer([2]), SIZE + 1)
        # What turns out larger than was said is removed itself.
        assert folder.put([3], None, lambda path: writer([3])(path) + 1, SIZE)
        folder.flush()
        assert lengths(folder, [1]) and not lengths(folder, [3])
        assert folder.counts == {
            "written": 1,
            "larger than the budget": 1,
            "failed: larger than the budget": 1,
        }
    assert len(list(tmp_path.glob("*.kvcache"))) == 1


@pytest.mark.parametrize("budget", [PLENTY, 30 * SIZE])
def test_two_processes_at_once(tmp_path: Path, budget: int) -> None:
    children = [child(tmp_path, "many", seed, budget) for seed in (1, 2)]
    assert [process.wait() for process in children] == [0, 0]
    found = check_all(tmp_path, min(200, budget // SIZE))
    every = {tuple(tokens) for seed in (1, 2) for tokens in sequences(seed, 100)}
    assert found == every if budget == PLENTY else found < every


@pytest.mark.parametrize("stage", ["before", "inside", "after"])
def test_an_end_in_the_middle_of_a_file(tmp_path: Path, stage: str) -> None:
    process = child(tmp_path, "hold", stage)
    assert process.stdout and process.stdout.readline() == f"{stage}\n"
    with folder_at(tmp_path) as folder:
        assert exact(folder, [1, 2]) and not exact(folder, [1, 3])
        # The process lives, so its file is left to it.
        assert put(folder, [1, 3])
        folder.flush()
        assert folder.counts == {"already there": 1}
        process.kill()
        process.wait()
        # Now it is known to have ended.
        assert put(folder, [1, 3])
        folder.flush()
        assert folder.counts["written"] == 1
    assert check_all(tmp_path) == {(1, 2), (1, 3)}


@pytest.mark.parametrize("stage", ["before", "inside", "after"])
def test_a_start_leaves_a_living_process_its_file(tmp_path: Path, stage: str) -> None:
    process = child(tmp_path, "hold", stage)
    assert process.stdout and process.stdout.readline() == f"{stage}\n"
    folder_at(tmp_path).close()
    process.communicate("go on\n")
    assert process.returncode == 0
    assert check_all(tmp_path) == {(1, 2), (1, 3)}


@pytest.mark.parametrize("budget", [PLENTY, 2 * SIZE])
@pytest.mark.parametrize("seed", range(3))
def test_an_end_at_any_time(tmp_path: Path, seed: int, budget: int) -> None:
    process = child(tmp_path, "loop", seed, budget)
    assert process.stdout
    printed = [process.stdout.readline() for _ in range(3 * seed + 1)]
    process.kill()
    process.communicate()
    found = check_all(tmp_path)
    if budget == PLENTY:
        assert {str(list(tokens)) for tokens in found} >= {line.strip() for line in printed}
    else:
        assert 0 < len(found) <= 2


def test_the_end_of_a_process_writes_what_was_put(tmp_path: Path) -> None:
    assert child(tmp_path, "leave", 3).wait() == 0
    assert check_all(tmp_path) == {tuple(tokens) for tokens in sequences(3, 20)}


def test_a_folder_that_is_dropped_ends_its_thread(tmp_path: Path) -> None:
    before = threading.enumerate()
    folder = folder_at(tmp_path)
    put(folder, [1])
    folder.flush()
    [thread] = [thread for thread in threading.enumerate() if thread not in before]
    dropped = weakref.ref(folder)
    del folder
    thread.join()
    assert dropped() is None


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
    with pytest.raises(CacheFileError, match=r"index.sqlite: made by a later release: version 2, not 1"):
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
        reason = "full" if isinstance(error, CacheFileError) else type(error).__name__
        assert folder.counts == {f"failed: {reason}": 1, "written": 1}
        assert put(folder, [1])
    assert check_all(tmp_path) == {(1,), (2,)}


def test_a_disk_that_is_behind(tmp_path: Path) -> None:
    go_on = threading.Event()

    def slow(tokens: list[int]) -> Callable[[Path], int]:
        write = writer(tokens)
        return lambda path: go_on.wait() and write(path)

    with folder_at(tmp_path, max_pending=2 * SIZE) as folder:
        assert folder.put([1], None, slow([1]), 3 * SIZE)
        assert not put(folder, [2])
        go_on.set()
        folder.flush()
        go_on.clear()
        assert folder.put([2], None, slow([2]), SIZE)
        assert not put(folder, [2])
        assert put(folder, [3])
        assert not put(folder, [4])
        go_on.set()
        folder.flush()
        assert put(folder, [4])
        folder.flush()
        assert folder.counts == {"written": 4, "behind": 2, "already there": 1}


def test_a_closed_one_cannot_be_used(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    put(folder, [1])
    folder.flush()
    [(_, found)] = folder.matches([1], None)
    put(folder, [2])
    folder.close()
    folder.close()
    uses = (
        lambda: put(folder, [1]),
        lambda: folder.matches([1], None),
        lambda: folder.touch(found),
        lambda: folder.discard(found),
        lambda: folder.flush(),
        lambda: folder.nbytes,
    )
    for use in uses:
        with pytest.raises(CacheError, match="closed"):
            use()
    assert check_all(tmp_path) == {(1,), (2,)}


def test_a_folder_cannot_be_used_after_a_fork(tmp_path: Path) -> None:
    script = f"""
import os
from tests.persist.filing import PrefixFolder, put
folder = PrefixFolder({str(tmp_path)!r}, 10**9, "model")
put(folder, [1])
folder.flush()
if not os.fork():
    try:
        folder.flush()
    except Exception as error:
        raise SystemExit(7 if "fork" in str(error) else 8)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
put(folder, [2])
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
    assert check_all(tmp_path) == {(1,), (2,)}


@pytest.mark.parametrize("seed", range(2))
def test_threads(tmp_path: Path, seed: int) -> None:
    errors: list[Exception] = []

    def use(folder: PrefixFolder, number: int) -> None:
        rng = random.Random(100 * seed + number)
        try:
            for tokens in sequences(number, 20):
                put(folder, tokens)
                for _, found in folder.matches(tokens[: rng.randrange(1, 7)], None):
                    rng.choice([folder.touch, folder.discard, id, id])(found)
        except Exception as error:  # noqa: BLE001  # reported by the main thread
            errors.append(error)

    with folder_at(tmp_path, 15 * SIZE) as folder:
        threads = [threading.Thread(target=use, args=(folder, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        folder.flush()
        assert folder.nbytes <= 15 * SIZE
        assert not any(name.startswith("failed") for name in folder.counts)
    check_all(tmp_path)
