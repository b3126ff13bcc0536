"""structure.md describes the package as it is: its modules, its packages, and the files it names."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, ROOT

PACKAGE = ROOT / "mlx_kvcache"
PAGE = (DOCS / "structure.md").read_text(encoding="utf-8")
SECTIONS = re.split(
    r"^### ", PAGE.partition("\n## The modules\n")[2].partition("\n## ")[0], flags=re.MULTILINE
)[1:]


def in_table(text: str) -> list[str]:
    """The modules that a table names, one a line."""
    return re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", text, re.MULTILINE)


def test_every_module_is_named_once() -> None:
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    # An `__init__` describes its folder, which has a paragraph of its own.
    own = sorted(module for module in modules if not module.endswith("__init__.py"))
    assert sorted(in_table(PAGE)) == own


def test_every_package_has_a_paragraph_and_its_own_table() -> None:
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")}
    found = set()
    for section in SECTIONS:
        title, _, text = section.partition("\n\n")
        package = title.strip("`").rstrip("/") if title.startswith("`") else "."
        found.add(package)
        assert not text.startswith("|"), package
        assert {module.rpartition("/")[0] or "." for module in in_table(section)} == {package}
    assert found == packages


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", PAGE))
    folders = (ROOT, PACKAGE)
    assert len(named) > 60
    assert not {name for name in named if not any((folder / name).exists() for folder in folders)}


def test_the_contracts_of_imports_are_counted() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert project.count("[[tool.importlinter.contracts]]") == 11
    assert project.count("exhaustive = true") == 7
    assert "eleven contracts" in PAGE and "first seven of these are exhaustive" in " ".join(PAGE.split())
