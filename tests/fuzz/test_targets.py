"""Each target on a few hundred inputs, the same every time; `make fuzz` tries more."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from .names import NAMES, target_of
from .worker import mutated

INPUTS = {"file": 300, "head": 300, "foreign": 300, "folder": 60}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_inputs(name: str) -> None:
    target = target_of(name)
    for data in islice(mutated(target, 0, list(target.seeds())), INPUTS.get(name, 60)):
        target.check(data)


def test_the_command_runs_and_replays(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"{}")
    command = [sys.executable, "-m", "tests.fuzz", "file", "--folder", str(tmp_path)]
    for more in (["--engine", "plain", "--seconds", "0"], ["--replay", str(tmp_path / "input")]):
        ended = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    assert not ended.stdout
    [told] = (tmp_path / "runs.txt").read_text().splitlines()
    assert told.startswith("file") and told.endswith("plain: 1 inputs, 0 edges, no finding")
