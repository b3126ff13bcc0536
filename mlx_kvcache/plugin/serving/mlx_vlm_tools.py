"""Patches mlx-vlm's tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_vlm.generate.ar import BatchGenerator

from . import mlx_vlm_batch

FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "_make_cache": (mlx_vlm_batch.original_make_cache, mlx_vlm_batch.make_cache),
    "_extend_cache": (mlx_vlm_batch.original_extend, mlx_vlm_batch.extend_cache),
    "maybe_quantize_kv_cache": (
        mlx_vlm_batch.original_quantize,
        mlx_vlm_batch.maybe_quantize_kv_cache,
    ),
}
"""Functions of mlx-vlm that modules import by name, each with its replacement."""

_PATCHES: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (BatchGenerator, "insert", mlx_vlm_batch.insert),
)
_originals: dict[tuple[type, str], Callable[..., Any]] = {
    (cls, name): getattr(cls, name) for cls, name, _ in _PATCHES
}


def patch(is_attached: bool) -> None:
    """Replace mlx-vlm's functions while a model is attached, and restore its own otherwise."""
    for cls, name, function in _PATCHES:
        setattr(cls, name, function if is_attached else _originals[cls, name])
