"""Leaves out what the installed mlx-lm does not have, or does wrongly itself."""

from __future__ import annotations

import pytest

from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from tests.plugin.configurations import FAULTY, MISSING


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        for value in callspec.params.values() if callspec else ():
            if isinstance(value, str) and value in MISSING:
                item.add_marker(pytest.mark.skip(f"mlx-lm {MLX_LM.version} has no {value}"))
            elif isinstance(value, str) and value in FAULTY:
                item.add_marker(pytest.mark.skip(f"in mlx-lm {MLX_LM.version}, {value}: {FAULTY[value]}"))
