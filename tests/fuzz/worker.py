"""Tries inputs on one target until its time is over: in a process of its own, since a finding ends it."""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .names import target_of

if TYPE_CHECKING:
    from .target import Target

PATIENCE = 60
"""Seconds that one input may take."""
MEMORY = 4096
"""MiB that the process may hold."""


def main() -> None:
    """Run one target, as `__main__` asks for it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "plain"))
    parser.add_argument("--replay", type=Path)
    chosen = parser.parse_args()
    engine = chosen.engine or best_engine()
    target = loaded(chosen.target, engine if chosen.replay is None else "plain")
    if chosen.replay is not None:
        target.check(chosen.replay.read_bytes())
        return
    corpus = chosen.folder / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    run = with_atheris if engine == "atheris" else without
    run(target, corpus, chosen.folder / f"crash-{target.name}-", chosen.seconds, chosen.seed)


def best_engine() -> str:
    """Guided by coverage, where there is a wheel of that."""
    return "atheris" if importlib.util.find_spec("atheris") else "plain"


def loaded(name: str, engine: str) -> Target:
    """A target, with the package instrumented where the engine follows its coverage."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["mlx_kvcache"]):
            return target_of(name)
    return target_of(name)


def with_atheris(target: Target, corpus: Path, prefix: Path, seconds: int, seed: int) -> None:
    """Guided by coverage; libFuzzer ends the process, and writes an input that fails."""
    import atheris

    options: dict[str, object] = {
        "max_total_time": seconds,
        "seed": seed or 1,
        "timeout": PATIENCE,
        "rss_limit_mb": MEMORY,
        "max_len": target.length,
        "artifact_prefix": prefix,
        "print_final_stats": 1,
        "len_control": 0,
        "reload": 0,
    }
    if target.words:
        words = prefix.with_name(f"{target.name}.dict")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        options["dict"] = words
    atheris.Setup(
        [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], target.check
    )
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def without(target: Target, corpus: Path, prefix: Path, seconds: int, seed: int) -> None:
    """At random. The input under way is in a file, should it end the process."""
    under_way, tried, end = prefix.with_name(f"{prefix.name}under-way"), 0, time.monotonic() + seconds
    for data in mutated(target, seed, [path.read_bytes() for path in sorted(corpus.iterdir())]):
        under_way.write_bytes(data)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        target.check(data)
        faulthandler.cancel_dump_traceback_later()
        tried += 1
        if tried % 1000 == 0:
            sys.stderr.write(f"#{tried}\n")
        if time.monotonic() > end:
            break
    under_way.unlink()
    sys.stderr.write(f"stat::number_of_executed_units: {tried}\n")


def mutated(target: Target, seed: int, corpus: list[bytes]) -> Iterator[bytes]:
    """The corpus, and endless changes of it."""
    yield from corpus
    rng = random.Random(f"{target.name} {seed}")
    while True:
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            _mutate(data, rng, target.words)
        yield bytes(data[: target.length])


def _mutate(data: bytearray, rng: random.Random, words: tuple[bytes, ...]) -> None:
    at = rng.randint(0, len(data))
    size = rng.randint(1, rng.choice((4, 64)))
    action: Any = rng.randrange(5)
    if action == 0:
        data[at : at + size] = rng.randbytes(min(size, len(data) - at))
    elif action == 1:
        del data[at : at + size]
    elif action == 2:
        data[at:at] = rng.choice(words) if words and rng.random() < 0.7 else rng.randbytes(size)
    elif action == 3 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    else:
        data[at:at] = data[at : at + size]


if __name__ == "__main__":
    main()
