"""Servers share the tokenizers of their models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.folders import tokenizers_read_once


@pytest.fixture(autouse=True, scope="package")
def shared_tokenizers() -> Iterator[None]:
    with tokenizers_read_once():
        yield
