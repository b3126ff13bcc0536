"""Tests of mlx-lm that pass on its own caches and cannot pass on this package's, and why."""

from __future__ import annotations

KNOWN: dict[str, str] = {}
"""Reasons by test: `file::class::name`."""
