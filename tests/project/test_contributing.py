"""CONTRIBUTING.md and CHANGELOG.md are true, and the modules keep to the sizes that CONTRIBUTING.md names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mlx_kvcache

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mlx_kvcache.__file__).parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGELOG = """# Changelog
## [Unreleased]
- later
## [1.2.0] - 2026-01-02
### Added
- a
## [1.2.0rc1]
- no date
## [1.1.0] - 2025-01-02
"""


def release_notes() -> ModuleType:
    """The script, which has no ending, as a module."""
    loader = importlib.machinery.SourceFileLoader("release_notes", str(ROOT / ".ci" / "release-notes"))
    spec = importlib.util.spec_from_loader("release_notes", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_target_is_named_and_every_named_one_exists() -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    table = re.findall(r"^\| `make ([a-z-]+)` \|", CONTRIBUTING, re.MULTILINE)
    assert sorted(table) == sorted(set(rules))
    assert set(re.findall(r"`make ([a-z-]+)", CONTRIBUTING)) <= set(rules)


def test_every_file_that_is_named_exists() -> None:
    named = {
        *re.findall(
            r"`((?:mlx_kvcache|tests|docs|examples|benchmarks|persist|\.ci|\.github)/[\w./-]*)", CONTRIBUTING
        ),
        *re.findall(r"\]\(([\w./]+)(?:#[\w-]*)?\)", CONTRIBUTING),
    }
    missing = {
        name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "mlx_kvcache"))
    }
    assert len(named) > 15
    assert not missing


def test_every_place_of_a_change_exists() -> None:
    """Each code span in "Where a change goes" is a file, a make target, or a name in a file of its row."""
    section = CONTRIBUTING.partition("## Where a change goes\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!change)(\w[^|]+) \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) >= 10
    for change, places in rows:
        spans = re.findall(r"`([^`]+)`", places)
        files = [span for span in spans if "/" in span or "." in Path(span).suffix]
        assert files, change
        assert not [name for name in files if not (ROOT / name).exists()], change
        text = "".join((ROOT / name).read_text(encoding="utf-8") for name in files if (ROOT / name).is_file())
        names = [span for span in spans if span not in files and not span.startswith("make ")]
        # A name may stand for all that begin alike, as `_plan_...`.
        assert not [name for name in names if name.removesuffix("...") not in text], change


def test_modules_are_of_the_size_that_is_asked_for() -> None:
    """One idea each, 40 to 600 lines; few enough to find by name."""
    low, high = map(int, re.findall(r"A module is one idea, in (\d+) to (\d+) lines", CONTRIBUTING)[0])
    files = list(PACKAGE.rglob("*.py"))
    modules = [path for path in files if path.name != "__init__.py"]
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert not {str(path): size for path, size in sizes.items() if not low <= size <= high}
    plugin = PACKAGE / "plugin"
    # Each host adds what is about it alone, under its own name.
    of_hosts = {path for path in modules if path.name.startswith(("mlx_lm", "mlx_vlm"))}
    assert len([path for path in modules if path.is_relative_to(plugin) and path not in of_hosts]) <= 32
    assert len(list(plugin.rglob("*/__init__.py"))) <= 8
    assert len(files) - len(of_hosts) <= 90


def test_the_lowest_versions_are_those_of_the_table() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = dict(re.findall(r"^\| ([\w, -]+) \| ([\d.]+) \|", CONTRIBUTING, re.MULTILINE))
    declared = {
        "Python, core": re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)[0],
        "mlx, core": re.findall(r'"mlx\[cpu\]>=([\d.]+);', project)[0],
        "mlx, plug-in": re.findall(r'^plugin = .*"mlx>=([\d.]+)"', project, re.MULTILINE)[0],
        "mlx-lm": re.findall(r'^plugin = .*"mlx-lm>=([\d.]+)"', project, re.MULTILINE)[0],
        "NumPy": re.findall(r'"numpy>=([\d.]+)"', project)[0],
    }
    assert declared == {name: core[name] for name in declared}


def test_versions_agree() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [mlx_kvcache.__version__]
    found = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert release_notes().version_of(found) == mlx_kvcache.__version__


def test_notes_of_a_release() -> None:
    notes = release_notes().notes
    assert notes("1.2.0", CHANGELOG) == "### Added\n- a"
    for version, message in (
        ("1.3.0", "nothing about 1.3.0"),
        ("1.1.0", "nothing"),
        ("1.2.0rc1", "YYYY-MM-DD"),
    ):
        with pytest.raises(ValueError, match=message):
            notes(version, CHANGELOG)


def test_another_tag_than_the_version_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "release-notes"), "99.0.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"the tag says 99.0.0, the package {mlx_kvcache.__version__}" in done.stderr
