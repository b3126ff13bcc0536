"""Leaves out what the installed mlx-lm does not have, or does wrongly itself; and what files share."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
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


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """A function takes up to seconds to compile for the CPU, and runs a few times in a test.

    Compiled once for all lengths, `hy_v4` of mlx-vlm would also keep the place where it partitions scores.
    """
    mx.disable_compile()
    yield
    mx.enable_compile()
