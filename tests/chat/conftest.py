"""Small models with SmolLM2's tokenizer, as folders that are loaded as a user's would be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from tests.folders import tokenizers_read_once, written


@pytest.fixture(autouse=True, scope="package")
def shared_tokenizers() -> Iterator[None]:
    with tokenizers_read_once():
        yield


@pytest.fixture(autouse=True, scope="package")
def short_waits() -> Iterator[None]:
    """After each key, a pilot sleeps twice before it asks whether the application is idle: 5 ms, not 20."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textual._wait.SLEEP_GRANULARITY", 1 / 200)
        patch.setattr("textual._wait.SLEEP_IDLE", 1 / 200 / 20)
        yield


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """One layer: keys and values depend on nothing but token and position, whatever was forgotten."""
    return written(tmp_path_factory.mktemp("models") / "flat", tokenizer, layers=1)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Heads of 48 features, not a multiple of the group size 64."""
    return written(tmp_path_factory.mktemp("models") / "odd", tokenizer, layers=1, head_dim=48)


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> tuple[nn.Module, Any]:
    from examples.chat.models import load

    return load(str(tiny))


@pytest.fixture(scope="session")
def flat_model(flat: Path) -> tuple[nn.Module, Any]:
    from examples.chat.models import load

    return load(str(flat))
