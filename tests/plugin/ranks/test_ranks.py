"""Models that are split over processes, on caches that agree."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.plugin.ranks import alike, disagreements
from tests.plugin.ranks.launch import launch


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


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    check(2, tmp_path, scenarios(alike))


def test_two_ranks_that_disagree(tmp_path: Path) -> None:
    check(2, tmp_path, scenarios(disagreements))


def test_four_ranks(tmp_path: Path) -> None:
    check(4, tmp_path, ["tensor_edits", "pipeline_edits", "other_numbers_of_tokens", "a_fault_of_one_rank"])


@pytest.mark.parametrize("module", [alike, disagreements])
def test_scenarios_are_found(module: object) -> None:
    assert len(scenarios(module)) > 7
