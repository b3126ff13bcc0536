"""A hub of models that has been downloaded before, so that pages can name models as their readers would."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

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
def hub(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, tiny: Path) -> Path:
    """SmolLM2 under its name, and two random layers with its tokenizer for a larger one."""
    folder: Path = tmp_path_factory.mktemp("hub")
    for name, model in ((REAL, smollm2_folder), (RANDOM, tiny)):
        place = _placed(folder, name)
        place.parent.mkdir()
        place.symlink_to(model)
    return folder


@pytest.fixture
def environment(hub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Lets this process, and those with these variables, find models in the hub's cache only."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = str(Path(__file__).parents[2])
    return {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "COLUMNS": "100"}
