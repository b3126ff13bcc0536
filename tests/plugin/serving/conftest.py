"""What tests of mlx-vlm's tools share: a text model as a folder, and loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

if find_spec("mlx_vlm") is None:
    collect_ignore_glob = ["test_mlx_vlm_*.py"]


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from tests.plugin.serving.mlx_vlm_models import text_folder

    return text_folder(tmp_path_factory.mktemp("models") / "text", tokenizer)


@pytest.fixture(scope="session")
def vlm(vlm_folder: Path) -> tuple[nn.Module, Any]:
    """The model and its processor, a tokenizer."""
    import mlx_vlm

    model, processor = mlx_vlm.load(str(vlm_folder))
    return model, processor
