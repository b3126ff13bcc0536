"""Files that show whether they are whole and whose they are; child processes write them, too."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_kvcache.persist.atomic import replacing
from mlx_kvcache.persist.disk_cache import Found, PrefixFolder
from mlx_kvcache.persist.index import unpacked

SIZE = 2000
PLENTY = 10**9
ROOT = Path(__file__).parents[2]


def body_of(tokens: Sequence[int]) -> bytes:
    text = json.dumps(list(tokens)).ljust(SIZE - 32).encode()
    return text + sha256(text).digest()


def writer(tokens: Sequence[int], pause: Callable[[str], None] = lambda stage: None) -> Callable[[Path], int]:
    """Writes a file of SIZE bytes, and pauses before, in the middle, and when all is in place."""

    def write(path: Path) -> int:
        pause("before")
        body = body_of(tokens)
        with replacing(path) as file:
            file.write(body[: SIZE // 2])
            pause("inside")
            file.write(body[SIZE // 2 :])
        pause("after")
        return SIZE

    return write


def put(folder: PrefixFolder, tokens: Sequence[int], salt: Hashable = None) -> bool:
    return folder.put(tokens, salt, writer(tokens), SIZE)


def is_whole(found: Found) -> bool:
    return found.path.read_bytes() == body_of(found.tokens)


def exact(folder: PrefixFolder, tokens: Sequence[int], salt: Hashable = None) -> Found | None:
    """What is found for just these tokens."""
    return next((found for _, found in folder.matches(tokens, salt) if found.tokens == tuple(tokens)), None)


def sequences(seed: int, number: int) -> Iterator[list[int]]:
    """Different sequences; all those of a seed begin alike."""
    rng = random.Random(seed)
    for serial in range(number):
        yield [seed, *rng.choices(range(3), k=5), serial]


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
        names = folder._index.salts("model")
        entries = [Found(unpacked(blob), path / name) for name, blob in folder._index.tokens(names)]
        assert all(is_whole(found) and exact(folder, found.tokens) == found for found in entries)
        assert folder.nbytes == SIZE * len(entries)
        assert count is None or len(entries) == count
    assert {entry.name for entry in path.iterdir()} == {
        "index.sqlite",
        *(found.path.name for found in entries),
    }
    return {found.tokens for found in entries}


def main(place: str, budget: str, action: str, argument: str) -> None:
    """What a child process does; the argument is a stage for `hold`, and a seed for the others."""
    folder = PrefixFolder(place, int(budget), "model")
    if action == "hold":
        # Put two files, and stop at a stage of the second until told to go on.
        put(folder, [1, 2])
        folder.put(
            [1, 3], None, writer([1, 3], lambda stage: hold(stage) if stage == argument else None), SIZE
        )
        folder.close()
    elif action == "loop":
        for tokens in sequences(int(argument), 10**6):
            put(folder, tokens)
            folder.flush()
            print(tokens, flush=True)  # noqa: T201
    elif action == "many":
        for tokens in sequences(int(argument), 100):
            assert put(folder, tokens)
            folder.flush()
            assert folder.nbytes <= int(budget)
            assert next(folder.matches(tokens, None))[0] > 0
        folder.close()
    elif action == "leave":
        # End without closing, with all still to write.
        for tokens in sequences(int(argument), 20):
            put(folder, tokens)


def hold(stage: str) -> None:
    print(stage, flush=True)  # noqa: T201
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
