"""Every numbered script runs as its reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("[0-9]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_chat_reads_a_pipe() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.chat", "--max-tokens", "4"],
        input="Say hi.\n/quit\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "reused 0 of 24 tokens" in run.stdout


def test_the_chat_says_what_it_cannot_load(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.chat", "--model", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "cannot load" in run.stderr
