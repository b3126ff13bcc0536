"""What targets there are, and where; nothing of the package is imported to say so."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .target import Target

PLACES = {
    "file": "containers.FILE",
    "head": "containers.HEAD",
    "foreign": "conversations.FOREIGN",
    "sequence": "sequences.SEQUENCES",
    "conversation": "conversations.OURS",
    "theirs": "conversations.THEIRS",
    "folder": "folders.FOLDER",
    "option": "options.OPTION",
    "core": "calls.CORE",
}
NAMES = tuple(PLACES)


def target_of(name: str) -> Target:
    """A target, of which no other's needs are imported."""
    module, _, attribute = PLACES[name].partition(".")
    target: Target = getattr(import_module(f"{__package__}.{module}"), attribute)
    assert target.name == name
    return target
