"""python -m tests.fuzz --help"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from . import worker
from .names import NAMES

FIGURES = re.compile(r"cov: (?P<edges>\d+)|number_of_executed_units: +(?P<tried>\d+)")


def main() -> int:
    """Run targets one after the other, or replay an input."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Tries inputs that nobody meant, and stops where something else than a typed error "
        "comes of one. Guided by coverage where atheris is installed, at random elsewhere. What an "
        "earlier run found worth keeping is gone on from.",
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the engine's random numbers")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="for corpus, logs and findings")
    parser.add_argument("--engine", choices=("atheris", "plain"), help="by default the best that is there")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one input, which a finding left")
    chosen = parser.parse_args()
    targets = chosen.targets or list(NAMES)
    if unknown := set(targets) - set(NAMES):
        parser.error(f"no target {sorted(unknown)}; there are {', '.join(NAMES)}")
    if chosen.replay is not None:
        if len(chosen.targets) != 1:
            parser.error("--replay needs the one target that the input is for")
        return _started([targets[0], str(chosen.folder), "--replay", str(chosen.replay)]).wait()
    engine = chosen.engine or worker.best_engine()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in targets if not _run(name, engine, chosen)]
    if failed:
        sys.stdout.write(f"findings in {', '.join(failed)}: see {chosen.folder}\n")
    return 1 if failed else 0


def _run(name: str, engine: str, chosen: argparse.Namespace) -> bool:
    """Run a target and say how it went; False where it found something."""
    begin, edges, tried, log = time.monotonic(), 0, 0, chosen.folder / f"{name}.log"
    before = _seconds_of_cpu()
    options = ["--engine", engine, "--seconds", str(chosen.seconds), "--seed", str(chosen.seed)]
    process = _started([name, str(chosen.folder), *options], subprocess.PIPE)
    assert process.stderr is not None
    with log.open("w", encoding="utf-8") as file:
        for line in process.stderr:
            file.write(line)
            for found in FIGURES.finditer(line):
                edges, tried = int(found["edges"] or edges), int(found["tried"] or tried)
            if line.startswith("#") and sys.stdout.isatty():
                told = " ".join(line.split()[:5])
                sys.stdout.write(f"\r{name:12} {time.monotonic() - begin:6.0f} s  {told:60.60}")
                sys.stdout.flush()
    is_clean = process.wait() == 0
    verdict = "no finding" if is_clean else f"A FINDING, see {log}"
    told = (
        f"{name:12} {_seconds_of_cpu() - before:6.0f} s of CPU, {engine}: "
        f"{tried:,} inputs, {edges:,} edges, {verdict}"
    )
    with (chosen.folder / "runs.txt").open("a", encoding="utf-8") as runs:
        runs.write(f"{told}\n")
    sys.stdout.write(f"\r{told:90}\n" if sys.stdout.isatty() else f"{told}\n")
    sys.stdout.flush()
    return is_clean


def _seconds_of_cpu() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _started(arguments: list[str], stderr: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"{__package__}.worker", *arguments]
    return subprocess.Popen(command, stderr=stderr, text=True, errors="replace")


if __name__ == "__main__":
    sys.exit(main())
