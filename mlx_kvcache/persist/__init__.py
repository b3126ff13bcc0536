"""Caches as files."""

from .files import Opened, load, save

__all__ = ["Opened", "load", "save"]
