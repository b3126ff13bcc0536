"""Changes a line of the package at a time, and asks the tests whether they notice.

    python -m tests.mutants --help

cosmic-ray finds the mutants and keeps the results. It would start a Python for each, which takes longer than
the tests; here each is a fork of a process that has imported what does not change. That process never
computes anything with MLX, whose streams do not survive a fork once they have been used.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx  # noqa: F401  # imported for the forks
import mlx.nn as nn  # noqa: F401
import numpy as np  # noqa: F401
import pytest
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult
from hypothesis import Phase, settings
from tqdm import tqdm

# That an example fails is enough; it need not become a small one.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")

PATIENCE = 120
"""Seconds of a mutant's tests; what takes longer has been noticed."""
PLUGINS = ("cacheprovider", "xdist", "asyncio", "syrupy", "textual-snapshot")
"""What the tests here do without, to begin sooner."""


def main() -> int:
    """Run what has not been run yet, and print what survives."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Runs mutants in a copy of the repository, since their files are changed in place.",
    )
    parser.add_argument(
        "session", type=Path, help="database of mutants and results, made where it is missing"
    )
    parser.add_argument(
        "--config", type=Path, default=Path("mutants.toml"), help="which modules, and operators"
    )
    parser.add_argument(
        "--tests", nargs="+", default=["tests/cells"], help="files that notice most come first"
    )
    parser.add_argument(
        "--of", default="mlx_kvcache/cells", help="modules below this path, default: %(default)s"
    )
    parser.add_argument("--sample", type=int, help="only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", action="store_true", help="run what has survived, too")
    parser.add_argument("--report", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    if not chosen.session.exists():
        for command in ("cosmic-ray init {config} {session}", "cr-filter-operators {session} {config}"):
            words = command.format(**vars(chosen)).split()
            subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], check=True)
    with use_db(str(chosen.session), mode=WorkDB.Mode.open) as db:
        if not chosen.report:
            if not _passes(chosen.tests):
                sys.stderr.write("the tests fail without any mutant\n")
                return 1
            items = [*db.pending_work_items, *(_survivors(db) if chosen.again else ())]
            items = [item for item in items if _path(item).startswith(chosen.of)]
            _run(db, _drawn(items, chosen.sample, chosen.seed), chosen.tests)
        _report(db, chosen.of)
    return 0


def _path(item: WorkItem) -> str:
    [mutation] = item.mutations
    path: str = mutation.module_path.as_posix()
    return path


def _drawn(items: list[WorkItem], sample: int | None, seed: int) -> list[WorkItem]:
    items.sort(key=lambda item: item.job_id)
    items.sort(key=lambda item: [(str(m.module_path), m.operator_name, m.occurrence) for m in item.mutations])
    return items if sample is None else random.Random(seed).sample(items, min(sample, len(items)))


def _run(db: WorkDB, items: list[WorkItem], tests: Sequence[str]) -> None:
    for item in tqdm(items, unit="mutant"):
        [mutation] = item.mutations
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        with use_mutation(mutation.module_path, operator, mutation.occurrence) as (_, mutated):
            if mutated is None:
                result = WorkResult(WorkerOutcome.NO_TEST)
            else:
                outcome = TestOutcome.SURVIVED if _passes(tests) else TestOutcome.KILLED
                result = WorkResult(WorkerOutcome.NORMAL, test_outcome=outcome)
        db.set_result(item.job_id, result)


def _passes(tests: Sequence[str]) -> bool:
    """Whether the tests pass, in a fork that imports the package as it is now."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(PATIENCE)
            sys.dont_write_bytecode = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = pytest.main([*tests, "-x", "-q", *(f"-pno:{plugin}" for plugin in PLUGINS)])
            os._exit(int(code))
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    return status == 0


def _survivors(db: WorkDB) -> list[WorkItem]:
    jobs = {job for job, result in db.results if result.test_outcome == TestOutcome.SURVIVED}
    return [item for item in db.work_items if item.job_id in jobs]


def _report(db: WorkDB, below: str) -> None:
    """Counts by module, and each survivor with its place."""
    items: dict[str, WorkItem] = {item.job_id: item for item in db.work_items}
    counts: dict[str, Counter[Any]] = {}
    for job, result in db.results:
        path = _path(items[job])
        if result.test_outcome is not None and path.startswith(below):
            counts.setdefault(path, Counter())[result.test_outcome.value] += 1
    for path, own in sorted(counts.items()):
        sys.stdout.write(f"{path}: {own['killed']} killed, {own['survived']} survived\n")
    for item in sorted(_survivors(db), key=lambda item: (_path(item), item.mutations[0].start_pos)):
        path, [mutation] = _path(item), item.mutations
        if path.startswith(below):
            line = Path(path).read_text(encoding="utf-8").splitlines()[mutation.start_pos[0] - 1].strip()
            name = mutation.operator_name.removeprefix("core/")
            place = f"{mutation.start_pos[0]}:{mutation.start_pos[1]}"
            sys.stdout.write(
                f"{path}:{place} {name} {mutation.operator_args or ''} #{mutation.occurrence}  {line}\n"
            )


if __name__ == "__main__":
    sys.exit(main())
