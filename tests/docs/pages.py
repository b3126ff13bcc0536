"""The pages a reader sees: README.md and everything in docs/."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def fences(page: Path) -> list[tuple[int, str]]:
    """Line and language of each code block, as CommonMark has them. Indented ones have no language."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    blocks = [token for token in tokens if token.type in {"fence", "code_block"}]
    return [((block.map or [0])[0] + 1, block.info) for block in blocks]
