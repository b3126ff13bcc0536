"""A folder that processes and threads share, and whatever ends them."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from mlx_kvcache.persist.disk_cache import PrefixFolder
from tests.persist.filing import (
    PLENTY,
    ROOT,
    SIZE,
    check_all,
    child,
    exact,
    folder_at,
    put,
    sequences,
)


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
