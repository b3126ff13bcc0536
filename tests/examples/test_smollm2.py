"""The command that writes the model as a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx_lm

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.smollm2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "538 MB" in done.stdout


def test_it_says_what_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "smollm2"
    done = run(str(folder))
    assert done.returncode == 0, done.stderr
    weights = (folder / "model.safetensors").stat().st_size
    assert f"{folder}: {weights / 1e6:,.0f} MB" in done.stdout.splitlines()[0]
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} is not empty; name another folder, or add --overwrite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run(str(tmp_path / "mine.txt"))
    assert done.returncode == 1
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr
