"""Reads text files that are added to a message."""

from __future__ import annotations

from pathlib import Path

from .tree import cleaned

LARGEST = 4_000_000
"""The largest file, in bytes."""


class CannotRead(Exception):
    """The file cannot be added; the message gives the reason."""


def read_text(name: str) -> str:
    """Read a text file. Raises CannotRead if it is missing, too large, or no text."""
    path = Path(name.strip()).expanduser()
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise CannotRead(f"{path} has {size:,} bytes, at most {LARGEST:,} can be added")
        text = path.read_text("utf-8")
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CannotRead(f"{path} is not a text file in UTF-8") from error
    if "\0" in text:
        raise CannotRead(f"{path} is not a text file: it has zero bytes")
    if not (text := cleaned(text).strip()):
        raise CannotRead(f"{path} is empty")
    return text
