"""A pytest plugin: every model is attached, before a test has imported anything of the host.

Tools of the host make caches of this package, and so does `make_cache` of every model of mlx-vlm, which its
tests call themselves.

The report tells how many prompt caches of this package were made, so that a run that made none is noticed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import mlx.nn as nn
import pytest

from mlx_kvcache.plugin.hosts import observe
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


def _make_cache_of_this_package(cls: type[nn.Module], /, **options: Any) -> None:
    """Replace `make_cache` of a new class of models, as `attach` does for a single model."""
    super(nn.Module, cls).__init_subclass__(**options)
    own = vars(cls).get("make_cache")
    module = f"{cls.__module__}."
    # Drafters and diffusion models have one, too, but tools never ask for a prompt cache for these.
    is_decoder = module.startswith("mlx_vlm.models.") and ".diffusion_gemma." not in module
    if own is None or not is_decoder:
        return

    @functools.wraps(own)
    def make_cache(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        is_asked = getattr(observe._asking, "model", None) is not None
        if is_asked or arguments or options:
            return own(self, *arguments, **options)
        return _attach._dispatchers[_host](self)

    cls.make_cache = make_cache  # type: ignore[attr-defined]


if _host.name == "mlx-vlm":
    nn.Module.__init_subclass__ = classmethod(_make_cache_of_this_package)  # type: ignore[assignment]
_attach.make_prompt_cache = _counted
_attach.attach_all(_host)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests that would end the run."""
    items[:] = [item for item in items if item.nodeid.rpartition("/")[2] not in TOO_LARGE[_host.name]]


@pytest.fixture(scope="session", autouse=True)
def _how_many(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    record_testsuite_property(MADE, _made)
