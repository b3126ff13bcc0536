"""A pytest plugin: every model is attached, before a test has imported anything of the host.

The report tells how many prompt caches of this package were made, so that a run that made none is noticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
from mlx_kvcache.plugin.hosts.layout import HOSTS

from .compare import MADE
from .known import TOO_LARGE

_attach: Any = import_module("mlx_kvcache.plugin.attach")  # the name in the package is the function
_make = _attach.make_prompt_cache
_host = next(host for host in HOSTS if host.name == os.environ["PEERS_HOST"])
_made = 0


def _counted(*arguments: Any, **options: Any) -> Any:
    global _made
    cache = _make(*arguments, **options)
    _made += 1
    return cache


_attach.make_prompt_cache = _counted
_attach.attach_all(_host)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests that would end the run."""
    items[:] = [item for item in items if item.nodeid.rpartition("/")[2] not in TOO_LARGE[_host.name]]


@pytest.fixture(scope="session", autouse=True)
def _how_many(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    record_testsuite_property(MADE, _made)
