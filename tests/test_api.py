"""What is public changes only where somebody means it to."""

from __future__ import annotations

import difflib
import importlib
import inspect

import pytest

from mlx_kvcache import CausalCache
from mlx_kvcache.caches.base import PlanningCache

from .api import MODULES, RECORD, lines


def test_names_and_signatures_are_those_on_record() -> None:
    """A name that goes, or is called otherwise, is a change that CONTRIBUTING.md has rules for."""
    recorded = RECORD.read_text(encoding="utf-8").splitlines()
    hint = "If this is meant: python -m tests.api, and a line in CHANGELOG.md"
    changes = list(difflib.unified_diff(recorded, list(lines()), "tests/api.txt", "now", lineterm="", n=0))
    assert not changes, "\n".join([*changes, hint])


@pytest.mark.parametrize("name", MODULES)
def test_all_is_all(name: str) -> None:
    """`__all__` is sorted, and has every name of this package that a public module has for others."""
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    if hasattr(module, "__path__"):
        imported = {
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and not inspect.ismodule(value) and key != "annotations"
        }
        assert set(module.__all__) == imported


def _renamed(self: CausalCache, which: int) -> int:
    return which


@pytest.mark.parametrize("changed", [_renamed, property(lambda self: 0), None])
def test_a_change_is_seen(changed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter with another name, a method that becomes a property, and one that is gone."""
    before = list(lines())
    if changed:
        monkeypatch.setattr(CausalCache, "end", changed, raising=False)
    else:
        monkeypatch.delattr(PlanningCache, "end")
    assert list(lines()) != before
