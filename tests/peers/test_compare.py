"""Comparing two runs, as reports that pytest itself has written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .compare import MADE, Run, compare, read

FILE = "test_sample.py"
SAMPLE = """
import os
import unittest
import pytest

attached = os.environ["RUN"] == "attached"

@pytest.fixture(scope="session", autouse=True)
def made(record_testsuite_property):
    record_testsuite_property({made!r}, 3 * attached)

class TestSample(unittest.TestCase):
    def test_same(self):
        pass

    def test_never(self):
        self.fail("needs Metal")

    def test_listed(self):
        self.assertFalse(attached, "listed reason")

    def test_unlisted(self):
        self.assertFalse(attached, "first line\\nsecond line")

    def test_skipped(self):
        if attached:
            self.skipTest("not here")

    def test_better(self):
        self.assertTrue(attached, "stock is wrong")

@pytest.fixture
def teardown():
    yield
    assert not attached

def test_teardown(teardown):
    pass
"""
LISTED = f"{FILE}::TestSample::test_listed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "tests").mkdir()
    sample = folder / "tests" / FILE
    sample.write_text(SAMPLE.format(made=MADE), encoding="utf-8")
    for run in ("stock", "attached"):
        command = [sys.executable, "-m", "pytest", str(sample), f"--junitxml={folder / run}.xml"]
        subprocess.run(
            [*command, "-c", "/dev/null", f"--rootdir={folder}"],
            env={"RUN": run},
            cwd=folder,
            check=False,
            capture_output=True,
        )
    return {run: read(folder / f"{run}.xml", FILE) for run in ("stock", "attached")}


def test_what_is_read(runs: dict[str, Run]) -> None:
    assert runs["stock"].counts() == "5 passed, 2 failed"
    assert runs["attached"].counts() == "2 passed, 1 skipped, 3 failed, 1 error"
    assert runs["attached"].made == 3
    assert runs["attached"].results[f"{FILE}::test_teardown"].outcome == "error"


def test_differences(runs: dict[str, Run]) -> None:
    known = {LISTED: "a reason", f"{FILE}::TestSample::test_same": "an old reason", "other.py::a": "not run"}
    text, is_good = compare(runs["stock"], runs["attached"], known, {FILE})
    assert not is_good
    first, *parts = text.split("\n")
    assert first == (
        "stock 5 passed, 2 failed; attached 2 passed, 1 skipped, 3 failed, 1 error, "
        "on 3 prompt caches of mlx_kvcache"
    )
    titles = [line for line in parts if not line.startswith(" ")]
    assert titles == [
        "Pass on stock caches and fail attached (3):",
        "Likewise, for known reasons (1):",
        "Have a known reason, but do not differ here (1):",
        "Pass attached only (1):",
    ]
    unknown = parts[1 : parts.index(titles[1])]
    assert [line.strip().split("::")[-1] for line in unknown[::2]] == [
        "test_skipped",
        "test_unlisted",
        "test_teardown",
    ]
    assert "second line" not in text
    assert "    because a reason" in parts
    assert "    passes now" in parts
    assert f"  {FILE}::TestSample::test_better" in parts
    assert "stock is wrong" in text
    assert "other.py" not in text
    assert "test_never" not in text


def test_all_differences_are_known(runs: dict[str, Run]) -> None:
    known = {f"{FILE}::TestSample::test_{n}": "a reason" for n in ("listed", "unlisted", "skipped")}
    known[f"{FILE}::test_teardown"] = "a reason"
    assert compare(runs["stock"], runs["attached"], known, {FILE})[1]
    known[f"{FILE}::TestSample::test_never"] = "a reason"
    text, is_good = compare(runs["stock"], runs["attached"], known, {FILE})
    assert is_good
    assert "does not pass on stock caches either" in text


def test_a_run_that_ended_early_fails_what_passed_on_stock(runs: dict[str, Run], tmp_path: Path) -> None:
    crashed = read(tmp_path / "missing.xml", FILE)
    crashed.made = 1
    text, is_good = compare(runs["stock"], crashed, {}, {FILE})
    assert not is_good
    assert "Pass on stock caches and fail attached (5):" in text
    assert "did not run" in text


def test_a_file_that_was_asked_for_must_compare_something(runs: dict[str, Run]) -> None:
    passing = {n: r for n, r in runs["stock"].results.items() if r.outcome == "passed"}
    failing = {n: r for n, r in runs["stock"].results.items() if r.outcome == "failed"}
    for stock, is_enough in ((passing, True), (failing, False), ({}, False)):
        run = Run(stock, made=1)
        text, is_good = compare(run, run, {}, {FILE}, needed={FILE})
        assert is_good == is_enough
        assert ("nothing is compared" in text) != is_enough
        assert compare(run, run, {}, {FILE})[1]


def test_a_run_that_attached_nothing_says_nothing(runs: dict[str, Run]) -> None:
    text, is_good = compare(runs["stock"], runs["stock"], {}, {FILE})
    assert not is_good
    assert "made no prompt cache" in text
