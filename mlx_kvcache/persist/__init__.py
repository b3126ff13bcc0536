"""Saves sequences of caches to files, and loads them."""

from .files import Opened, load, save

__all__ = ["Opened", "load", "save"]
