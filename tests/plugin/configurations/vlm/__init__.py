"""A small configuration for every language model of mlx-vlm, and for some of its whole vision models."""

from __future__ import annotations

from tests.plugin.configurations.vlm.language import build_language_model
from tests.plugin.configurations.vlm.modules import language_modules
from tests.plugin.configurations.vlm.tables import (
    VLM_CONFIGURATIONS,
    VLM_DIFFERS_IN_BLOCKS,
    VLM_NOT_BUILT,
    VLM_STAY_NARROW,
)
from tests.plugin.configurations.vlm.whole import VLM_WHOLE, build_vlm, picture

__all__ = [
    "VLM_CONFIGURATIONS",
    "VLM_DIFFERS_IN_BLOCKS",
    "VLM_NOT_BUILT",
    "VLM_STAY_NARROW",
    "VLM_WHOLE",
    "build_language_model",
    "build_vlm",
    "language_modules",
    "picture",
]
