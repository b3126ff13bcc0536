"""A file to read and to damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_kvcache.persist.container import write

from .samples import HEADER, few


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    write(tmp_path / "cache.safetensors", HEADER, few())
    return tmp_path / "cache.safetensors"
