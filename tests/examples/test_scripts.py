"""Every numbered script runs, some as their readers would run them, the others in this process."""

from __future__ import annotations

import gc
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from examples import smollm2

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("[0-9]*.py"))

HERE = ["05_attach", "08_many", "09_tomorrow", "11_agent"]
"""Scripts that run on a SmolLM2 that is loaded: importing mlx-lm and loading would take longer."""


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in HERE])
def test_runs(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("name", HERE)
def test_runs_on_a_model_that_is_loaded(
    name: str,
    chat_model: tuple[nn.Module, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(smollm2, "load", lambda: chat_model)
    runpy.run_module(f"examples.{name}", run_name="__main__").clear()
    gc.collect()
    assert capsys.readouterr().out.strip()


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
