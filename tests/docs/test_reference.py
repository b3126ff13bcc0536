"""The reference describes what is public, all of it and nothing else."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.docs.pages import DOCS, ROOT

PAGES = {
    "mlx_kvcache": "core.md",
    "mlx_kvcache.plugin": "plugin.md",
    "mlx_kvcache.sessions": "sessions.md",
    "mlx_kvcache.persist": "persist.md",
}
"""Public modules, and the pages that describe their names."""
COMMANDS = (["mlx_kvcache.plugin"], ["mlx_kvcache.persist", "show"])


def found_at(path: str) -> object:
    """The object that a page names."""
    parts = path.split(".")
    found: object = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        # A function may have the name of its module.
        module = ".".join(parts[:index])
        found = sys.modules[module] if module in sys.modules and index < len(parts) else getattr(found, part)
    return found


def described(page: str) -> list[object]:
    text = (DOCS / "reference" / page).read_text(encoding="utf-8")
    return [found_at(path) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("module", PAGES)
def test_public_names_are_described_and_no_others(module: str) -> None:
    package = importlib.import_module(module)
    told = described(PAGES[module])
    public = {name: getattr(package, name) for name in package.__all__}
    assert [name for name, own in public.items() if own not in told] == []
    assert [own for own in told if own not in public.values()] == []
    assert len(told) == len(public)


def test_every_page_of_names_is_known() -> None:
    with_names = [p.name for p in (DOCS / "reference").glob("*.md") if ":::" in p.read_text(encoding="utf-8")]
    assert sorted(with_names) == sorted(PAGES.values())


def members(own: type) -> Iterator[tuple[str, object]]:
    """The public members of a class that this package defines."""
    for base in own.__mro__:
        if base.__module__.startswith("mlx_kvcache"):
            for name in vars(base):
                if not name.startswith("_"):
                    yield f"{own.__name__}.{name}", inspect.getattr_static(own, name)


@pytest.mark.parametrize("module", PAGES)
def test_public_things_have_docstrings(module: str) -> None:
    bare = []
    for own in described(PAGES[module]):
        if not inspect.getdoc(own):
            bare.append(str(own))
        if isinstance(own, type):
            fields = getattr(own, "__annotations__", {})
            for name, member in members(own):
                is_code = isinstance(member, (property, classmethod, staticmethod)) or callable(member)
                plain = name.partition(".")[2]
                if is_code and plain not in fields and not _inherited_doc(own, plain):
                    bare.append(name)
    assert bare == []


def _inherited_doc(own: type, name: str) -> str | None:
    """A member's docstring, or that of what it overrides."""
    return inspect.getdoc(getattr(own, name)) or next(
        (doc for base in own.__mro__ if name in vars(base) and (doc := inspect.getdoc(vars(base)[name]))),
        None,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_options_of_commands_are_described(command: list[str]) -> None:
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    section = page.split(f"## python -m {' '.join(command)}\n")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", done.stdout, re.MULTILINE))
    assert told == options - {"--help"}
