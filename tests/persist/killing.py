"""Writers killed at random moments. A program of its own, since it forks, which MLX need not survive."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from mlx_kvcache.errors import CacheFileError
from mlx_kvcache.persist.container import Stored, read_arrays, read_contents, write

VERSIONS = 8


def version(number: int) -> dict[str, Stored]:
    """Arrays whose sizes and bytes are of one version only."""
    rng = np.random.default_rng(number)
    sizes = {"keys": 200_000 + number, "values": 100_000 - number, "few": number}
    return {name: Stored("U8", (n,), rng.integers(0, 256, n, np.uint8)) for name, n in sizes.items()}


def rewrite(path: Path, seed: int, ready: int) -> NoReturn:
    """Write one version after the other until the end, and say through a pipe that it begins."""
    rng = random.Random(seed)
    try:
        os.write(ready, b"!")
        while True:
            number = rng.randrange(VERSIONS)
            write(path, {"version": number}, version(number))
    finally:
        os._exit(1)


def kill_after(seconds: float, child: int, ready: int) -> None:
    """Kill a writer so long after it has begun."""
    os.read(ready, 1)
    # Waits for nothing, so that a busy machine goes on with the writer meanwhile.
    select.select([], [], [], seconds)
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
    seen, whole, left = set[int](), 0, 0
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            rewrite(path, rng.randrange(1 << 30), writing)
        kill_after(rng.uniform(0, 0.02), child, reading)
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
