"""Every code block of README.md and docs/ runs; what a page says is printed is printed."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from tests.docs.pages import DOCS, PAGES, ROOT, fences
from tests.docs.running import Reader

NOT_RUN: dict[tuple[str, str], int] = {}
"""Blocks that cannot run here, by page and the reason that the page gives (`skip: next "REASON"`)."""


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page)], ids=named)
def test_blocks_run(
    page: Path, environment: dict[str, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = mlx_lm_cache.make_prompt_cache
    # Files that a page names lie in a folder of its own.
    monkeypatch.chdir(tmp_path)
    document = Reader(tmp_path, environment, tiny).document(page)
    mx.random.seed(0)
    try:
        for example in document:
            # That these are the ones that are told, the next test compares.
            with suppress(SkipTest):
                example.evaluate()
    finally:
        document.namespace.clear()
        gc.collect()
    # A model that is attached takes what it has changed with it.
    assert mlx_lm_cache.make_prompt_cache is original


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_block_is_passed_over(page: Path, tmp_path: Path) -> None:
    """As many blocks are run as CommonMark finds; those that are not are told, with a reason."""
    document = Reader(tmp_path, {}, tmp_path).document(page)
    directives = [example.parsed for example in document if not isinstance(example.parsed, str)]
    assert all(action == "next" for action, _ in directives)
    reasons = [reason.strip("\"' ") for _, reason in directives]
    assert {reason: reasons.count(reason) for reason in reasons} == {
        reason: count for (name, reason), count in NOT_RUN.items() if name == named(page)
    }
    lines = [example.line for example in document if isinstance(example.parsed, str)]
    assert lines == [line for line, _ in fences(page)]


def test_there_are_pages() -> None:
    assert DOCS / "index.md" in PAGES
    assert sum(len(fences(page)) for page in PAGES) > 40
