"""A small configuration for every model module of mlx-lm."""

from __future__ import annotations

from tests.plugin.configurations.build import build, model_modules, module_of
from tests.plugin.configurations.common import VOCABULARY, WINDOW
from tests.plugin.configurations.tables import CONFIGURATIONS, UNBUILDABLE

__all__ = ["CONFIGURATIONS", "UNBUILDABLE", "VOCABULARY", "WINDOW", "build", "model_modules", "module_of"]
