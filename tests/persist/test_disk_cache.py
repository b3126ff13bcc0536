"""A folder of files by their beginnings: found, and bounded."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest

from mlx_kvcache import CacheError
from mlx_kvcache.radix_tree import PrefixTree
from tests.persist.filing import (
    SIZE,
    check_all,
    exact,
    folder_at,
    is_whole,
    lengths,
    put,
    writer,
)


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
