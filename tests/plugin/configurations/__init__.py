"""A small configuration for every model module of mlx-lm."""

from __future__ import annotations

from tests.plugin.configurations.build import build, model_modules
from tests.plugin.configurations.common import VOCABULARY, WINDOW, module_of
from tests.plugin.configurations.tables import (
    CONFIGURATIONS,
    DIFFERS_IN_BLOCKS,
    DIFFERS_WITHOUT_CACHE,
    FAULTY,
    KINDS,
    MISSING,
    UNBUILDABLE,
    chosen,
)
from tests.plugin.configurations.wide import STAY_NARROW

__all__ = [
    "CONFIGURATIONS",
    "DIFFERS_IN_BLOCKS",
    "DIFFERS_WITHOUT_CACHE",
    "FAULTY",
    "KINDS",
    "MISSING",
    "STAY_NARROW",
    "UNBUILDABLE",
    "VOCABULARY",
    "WINDOW",
    "build",
    "chosen",
    "model_modules",
    "module_of",
]
