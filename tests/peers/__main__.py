"""Runs the own tests of a host, mlx-lm or mlx-vlm, on its caches and then on this package's, and compares.

python -m tests.peers --help
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from . import sources
from .compare import Run, compare, read
from .known import KNOWN

ROOT = Path(__file__).parents[2]
PLUGINS = {
    "stock": ("tests.peers.package", "tests.peers.hub"),
    "attached": ("tests.peers.package", "tests.peers.hub", "tests.peers.attached"),
}
"""The pytest plugins of each run, in the order in which they are loaded."""


def main() -> int:
    """Run the tests and report; 1 where this package's caches fail a test that the host's pass."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.peers",
        description="Runs the tests of the installed mlx-lm or mlx-vlm twice: on its own caches, and with "
        "every model attached to this package's. Fails if a test passes on the former and not on the latter, "
        "unless tests/peers/known.py gives the reason. Names of models on the hub stand for SmolLM2.",
    )
    parser.add_argument(
        "--host", choices=list(KNOWN), default="mlx-lm", help="whose tests (default: %(default)s)"
    )
    parser.add_argument(
        "--tests",
        type=Path,
        metavar="FOLDER",
        help="the folder of the tests: needed for mlx-vlm, whose sdist has none; "
        "those of mlx-lm are downloaded by default",
    )
    parser.add_argument(
        "--files", nargs="+", metavar="FILE", help="names of the host's test files, such as test_generate.py"
    )
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds for each file of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/peers"),
        help="for the downloaded tests, the model and the results (default: %(default)s)",
    )
    parser.add_argument(
        "--reuse-stock",
        action="store_true",
        help="take the results of an earlier stock run of the same files",
    )
    chosen = parser.parse_args()
    host, installed = chosen.host, version(chosen.host)
    folder = chosen.folder.absolute()
    try:
        tests = sources.tests_of(host, installed, folder, chosen.tests)
        names = sources.chosen(tests, chosen.files)
        environment = os.environ | sources.environment(host, tests, sources.model(folder), ROOT)
    except sources.Missing as error:
        sys.stderr.write(f"{error}\n")
        return 2
    root = folder / "results" / f"{host}-{installed}"
    runs = {}
    for kind in PLUGINS:
        results = root / kind
        results.mkdir(parents=True, exist_ok=True)
        runs[kind] = Run()
        for name in names:
            report = results / f"{name}.xml"
            if not (kind == "stock" and chosen.reuse_stock and report.exists()):
                report.unlink(missing_ok=True)
                _run(kind, tests / name, report, environment, chosen.timeout)
            runs[kind].add(read(report, name))
    text, is_good = compare(runs["stock"], runs["attached"], KNOWN[host], set(names), set(chosen.files or ()))
    sys.stdout.write(f"\n{host} {installed}: {text}\nLogs are in {root}.\n")
    return 0 if is_good else 1


def _run(kind: str, file: Path, report: Path, environment: dict[str, str], timeout: int) -> None:
    """Run the tests of one file in a process of its own: a crash costs the results of that file only."""
    command = [
        *(sys.executable, "-m", "pytest", str(file), "-q", f"--junitxml={report}"),
        *("-c", os.devnull, f"--rootdir={file.parents[1]}", "-p", "no:cacheprovider"),
        *(word for plugin in PLUGINS[kind] for word in ("-p", plugin)),
    ]
    sys.stdout.write(f"{kind:9} {file.name:26} ")
    sys.stdout.flush()
    begin, how = time.monotonic(), ""
    with report.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            # In a folder without the host's package, which Python would take instead of the installed one.
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=timeout, stdout=log, stderr=log, check=False
            )
            if not report.exists():
                how = f", ended with {done.returncode} before its report"
        except subprocess.TimeoutExpired:
            how = ", stopped at the time limit"
    counts = read(report, file.name).counts()
    sys.stdout.write(f"{counts}{how}, {time.monotonic() - begin:.0f} s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
