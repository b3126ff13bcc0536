"""Compares the results of two runs of the same tests, which pytest has written as JUnit XML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

MADE = "prompt caches of mlx_kvcache"
"""The property of a report that counts them."""
OUTCOMES = ("passed", "skipped", "failed", "error")
"""From best to worst: a test that passes and whose teardown fails is written as two."""
_TAGS = {"skipped": "skipped", "failure": "failed", "error": "error"}


@dataclass(frozen=True)
class Result:
    """How a test went, and the first line of what it said."""

    outcome: str
    message: str = ""


@dataclass
class Run:
    """Results by test: `file::class::name`."""

    results: dict[str, Result] = field(default_factory=dict)
    made: int = 0
    """Prompt caches of this package."""

    def add(self, other: Run) -> None:
        self.results |= other.results
        self.made += other.made

    def counts(self) -> str:
        found = Counter(result.outcome for result in self.results.values())
        return ", ".join(f"{found[o]} {o}" for o in OUTCOMES if found[o]) or "no results"


def read(report: Path, file: str) -> Run:
    """The run of one test file, without results where there is no report."""
    run = Run()
    if not report.exists():
        return run
    root = ET.parse(report).getroot()  # noqa: S314  # written by pytest a moment ago
    for case in root.iter("testcase"):
        # "tests.test_file.Class", or nothing where the file could not be imported.
        name = "::".join([file, *case.get("classname", "").split(".")[2:], case.get("name", "")])
        result = max((_result(child) for child in case), key=_badness, default=Result("passed"))
        run.results[name] = max(run.results.get(name, Result("passed")), result, key=_badness)
    run.made = sum(int(p.get("value", 0)) for p in root.iter("property") if p.get("name") == MADE)
    return run


def _result(child: ET.Element) -> Result:
    message = (child.get("message") or "").strip()
    return Result(_TAGS.get(child.tag, "passed"), message.partition("\n")[0])


def _badness(result: Result) -> int:
    return OUTCOMES.index(result.outcome)


def compare(
    stock: Run, attached: Run, known: Mapping[str, str], files: Set[str], needed: Set[str] = frozenset()
) -> tuple[str, bool]:
    """The report on two runs, and whether it is good.

    It is good if no test that passes on stock caches fails attached without a known reason.

    Args:
        stock, attached: the two runs.
        known: reasons by test.
        files: the test files that were run.
        needed: those of which at least one test must pass on stock caches.
    """
    gone = Result("did not run")
    both = {
        name: (stock.results.get(name, gone), attached.results.get(name, gone))
        for name in sorted(stock.results.keys() | attached.results.keys())
    }
    worse = {n: after for n, (before, after) in both.items() if _passed(before) and not _passed(after)}
    better = {n: before for n, (before, after) in both.items() if _passed(after) and not _passed(before)}
    unknown = {n: _told(after) for n, after in worse.items() if n not in known}
    listed = {n: f"{_told(after)}\n    because {known[n]}" for n, after in worse.items() if n in known}
    agree = {
        n: "passes now" if n in both and _passed(both[n][1]) else "does not pass on stock caches either"
        for n in sorted(known)
        if n not in worse and any(_is_of(n, file) for file in files)
    }
    silent = {
        file: next((f"stock: {_told(r)}" for n, r in stock.results.items() if _is_of(n, file)), "did not run")
        for file in sorted(files)
        if not any(_passed(result) and _is_of(name, file) for name, result in stock.results.items())
    }
    parts = [f"stock {stock.counts()}; attached {attached.counts()}, on {attached.made} {MADE}"]
    for title, tests in (
        ("Pass on stock caches and fail attached", unknown),
        ("Likewise, for known reasons", listed),
        ("Have a known reason, but do not differ here", agree),
        ("No test of the file passes on stock caches, so nothing is compared", silent),
        ("Pass attached only", {n: f"stock: {_told(before)}" for n, before in better.items()}),
    ):
        if tests:
            parts.append(f"{title} ({len(tests)}):")
            parts += [f"  {name}\n    {why}" for name, why in tests.items()]
    if not attached.made:
        parts.append("The attached run made no prompt cache of mlx_kvcache, so it says nothing.")
    return "\n".join(parts), not unknown and attached.made > 0 and not needed & silent.keys()


def _is_of(name: str, file: str) -> bool:
    return name.startswith(f"{file}::")


def _passed(result: Result) -> bool:
    return result.outcome == "passed"


def _told(result: Result) -> str:
    return f"{result.outcome}: {result.message}" if result.message else result.outcome
