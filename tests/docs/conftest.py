"""A hub of models that has been downloaded before, so that pages can name models as their readers would."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import constants

from examples import smollm2

REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANDOM = "mlx-community/Llama-3.2-3B-Instruct-4bit"
REVISION = "0" * 40


def _placed(hub: Path, name: str) -> Path:
    """Where the hub's cache has the newest version of a model."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return folder / "snapshots" / REVISION


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Path]:
    """SmolLM2 under its name, and two random layers with its tokenizer for a larger one."""
    folder: Path = tmp_path_factory.mktemp("hub")
    smollm2.export(_placed(folder, REAL), mx.float32)
    other = _placed(folder, RANDOM)
    other.parent.mkdir()
    other.symlink_to(tiny)
    yield folder
    # Half a gigabyte, which pytest would keep for some runs.
    shutil.rmtree(folder)


@pytest.fixture
def environment(hub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Lets this process, and those with these variables, find models in the hub's cache only."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = str(Path(__file__).parents[2])
    return {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "COLUMNS": "100"}
