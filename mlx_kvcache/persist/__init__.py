"""Caches as files."""

from .files import load, save

__all__ = ["load", "save"]
