"""Models that are split over processes, on caches that agree."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

from tests.plugin.configurations import build
from tests.plugin.ranks import alike, disagreements
from tests.plugin.ranks.launch import launch
from tests.plugin.ranks.matrix import splittable, ways


def scenarios(module: object) -> list[str]:
    """Names of a module's scenarios, in the order in which they are written."""
    found = inspect.getmembers(module, inspect.isfunction)
    own = [name for name, f in found if f.__module__ == getattr(module, "__name__", "") and name[0] != "_"]
    return sorted(own, key=lambda name: getattr(module, name).__code__.co_firstlineno)


def check(size: int, folder: Path, names: list[str]) -> None:
    """All ranks pass all scenarios."""
    for rank, done in enumerate(launch(size, folder, *names)):
        passed = [line.removeprefix("passed ") for line in done.stdout.splitlines() if line[:7] == "passed "]
        assert (done.returncode, passed) == (0, names), f"rank {rank}:\n{done.stdout}"


def test_two_ranks(tmp_path: Path) -> None:
    """They do what one process does, and what they are not to do all of them refuse."""
    names = [*scenarios(alike), *scenarios(disagreements)]
    if "pipeline" in ways(build("qwen3_next")):
        # The send of the first rank hangs on a recurrence's state. mlx-lm 0.31 has no such model.
        names.append("architecture=qwen3_next/pipeline")
    check(2, tmp_path, names)


def test_four_ranks(tmp_path: Path) -> None:
    check(4, tmp_path, ["tensor_edits", "pipeline_edits", "other_options"])


@pytest.mark.skipif("RANKS_MATRIX" not in os.environ, reason="takes minutes; `make ranks` runs it")
def test_every_architecture_that_can_be_split(tmp_path: Path) -> None:
    names = [f"architecture={name}" for name in splittable()]
    for start in range(0, len(names), 8):
        check(2, tmp_path, names[start : start + 8])


@pytest.mark.skipif("RANKS_MATRIX" not in os.environ, reason="takes minutes; `make ranks` runs it")
def test_four_ranks_in_everything(tmp_path: Path) -> None:
    for names in (scenarios(alike), scenarios(disagreements)):
        check(4, tmp_path, names)


@pytest.mark.parametrize("module", [alike, disagreements])
def test_scenarios_are_found(module: object) -> None:
    assert len(scenarios(module)) > 7
