"""Patches mlx-vlm's tools."""

from __future__ import annotations

from typing import Any

FUNCTIONS: dict[str, tuple[Any, Any]] = {}
"""Functions of mlx-vlm that modules import by name, each with its replacement."""


def patch(is_attached: bool) -> None:
    """Replace mlx-vlm's functions while a model is attached, and restore its own otherwise."""
