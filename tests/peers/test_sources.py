"""Unpacking a source distribution, and choosing among its tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from . import sources


def sdist(folder: Path, version: str, *names: str) -> None:
    with tarfile.open(folder / f"mlx_lm-{version}.tar.gz", "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"mlx_lm-{version}/{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"pass"))


def test_only_the_tests_are_unpacked(tmp_path: Path) -> None:
    sdist(tmp_path, "1.0", "mlx_lm/__init__.py", "tests/test_b.py", "tests/test_a.py", "tests/helper.py")
    tests = sources.tests_of("mlx-lm", "1.0", tmp_path, None)
    assert sorted(path.name for path in tests.parent.rglob("*.py")) == ["helper.py", "test_a.py", "test_b.py"]
    assert sources.chosen(tests, None) == ["test_a.py", "test_b.py"]
    assert sources.chosen(tests, ["test_b.py"]) == ["test_b.py"]
    with pytest.raises(sources.Missing, match=r"no test files \['test_c.py'\]; it has test_a.py, test_b.py"):
        sources.chosen(tests, ["test_a.py", "test_c.py"])


def test_a_distribution_without_tests_is_told(tmp_path: Path) -> None:
    sdist(tmp_path, "1.0", "mlx_lm/__init__.py")
    with pytest.raises(sources.Missing, match=r"mlx-lm 1\.0 has no tests"):
        sources.tests_of("mlx-lm", "1.0", tmp_path, None)


def test_a_checkout_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(sources.Missing, match=r"mlx-vlm 1\.0 has no tests in its sdist; pass --tests FOLDER"):
        sources.tests_of("mlx-vlm", "1.0", tmp_path, None)
    with pytest.raises(
        sources.Missing, match=r"mlx-vlm 1\.0 has no tests \(test_\*\.py\) in .*--tests FOLDER"
    ):
        sources.tests_of("mlx-vlm", "1.0", tmp_path, tmp_path)
    (tmp_path / "test_a.py").touch()
    assert sources.tests_of("mlx-vlm", "1.0", tmp_path, tmp_path) == tmp_path
