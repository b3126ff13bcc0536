"""Every file that a page links to or names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_linked_and_named_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if ":" not in link}
    assert not sorted(link for link in links if link and not (page.parent / link).exists())
    names = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|md|json|toml|yml))`", text))
    bases = ROOT, ROOT / "mlx_kvcache", page.parent
    assert not sorted(name for name in names if not any((base / name).exists() for base in bases))
