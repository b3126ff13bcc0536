"""Writers killed at random lines. A program of its own, since it forks, which MLX need not survive."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from mlx_kvcache.errors import CacheFileError
from mlx_kvcache.persist.container import Stored, read_arrays, read_contents, write

VERSIONS = 8
PACKAGE = str(Path("mlx_kvcache", "persist"))


def version(number: int) -> dict[str, Stored]:
    """Arrays whose sizes and bytes are of one version only."""
    rng = np.random.default_rng(number)
    sizes = {"keys": 200_000 + number, "values": 100_000 - number, "few": number}
    return {name: Stored("U8", (n,), rng.integers(0, 256, n, np.uint8)) for name, n in sizes.items()}


def at_line(number: int, act: Callable[[], None]) -> Callable[..., Any]:
    """A trace function that acts before the line of the package's that is run as the `number`-th."""
    counted = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counted
        if PACKAGE not in frame.f_code.co_filename:
            return None
        counted += event == "line"
        if event == "line" and counted == number:
            act()
        return trace

    return trace


def lines_of_a_write(path: Path) -> int:
    """How many lines of the package one version takes."""
    counted = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counted
        counted += event == "line"
        return count if PACKAGE in frame.f_code.co_filename else None

    sys.settrace(count)
    write(path, {"version": 0}, version(0))
    sys.settrace(None)
    path.unlink()
    return counted


def rewrite(path: Path, seed: int, line: int, there: int) -> NoReturn:
    """Write one version after the other until the end, and say through a pipe that this line is reached."""
    rng = random.Random(seed)

    def reached() -> None:
        os.write(there, b"!")
        if seed % 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.settrace(at_line(line, reached))
        while True:
            number = rng.randrange(VERSIONS)
            write(path, {"version": number}, version(number))
    finally:
        os._exit(1)


def kill(child: int, there: int) -> None:
    """Kill a writer that is there, unless it does so itself."""
    os.read(there, 1)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer failed by itself"


def check(path: Path) -> int:
    """The version that is in a file, which must be whole."""
    contents = read_contents(path)
    number: int = contents.header["version"]
    expected = version(number)
    found = dict(read_arrays(contents))
    assert found.keys() == expected.keys()
    for name, stored in expected.items():
        assert found[name][:2] == stored[:2]
        np.testing.assert_array_equal(found[name].data, stored.data)
    return number


def main(path: Path, kills: int, seed: int) -> dict[str, int]:
    """How often a file was there, how many versions were seen, and how many kills left something."""
    rng = random.Random(seed)
    lines = lines_of_a_write(path)
    seen, whole, left = set[int](), 0, 0
    for turn in range(kills):
        # In the first version, or in the one that takes its place.
        line = rng.randrange(1, 2 * lines)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            rewrite(path, turn, line, writing)
        kill(child, reading)
        os.close(reading)
        os.close(writing)
        left += any(path.parent.glob(".*"))
        there = path.exists()
        # Reading removes what is left even where the file itself is not there yet.
        with nullcontext() if there else suppress(CacheFileError):
            seen.add(check(path))
        whole += there
        assert list(path.parent.iterdir()) in ([], [path])
    return {"whole": whole, "versions": len(seen), "left": left}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
