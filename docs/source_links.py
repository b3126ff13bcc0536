"""A hook of MkDocs: files outside docs/, of which pages are made or to which they link."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger(__name__)
ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"^<!-- include (?P<name>\w+\.md) -->$", re.MULTILINE)
LOCAL = re.compile(r"\]\((?!\w+:|#)(?P<target>[^)#\s]+)")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Point to the repository where its address is known, else leave the name of the file as text.

    A line `<!-- include NAME.md -->` is that file of the repository's root.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent
    markdown = INCLUDE.sub(lambda found: _included(found["name"], folder), markdown)

    def replaced(found: re.Match[str]) -> str:
        path = (folder / found["target"]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]
        if not path.is_relative_to(ROOT) or not path.exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, found["target"])
            return found[0]
        if not config.repo_url:
            return found["text"]
        place = f"{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT).as_posix()}"
        return f"[{found['text']}]({config.repo_url.rstrip('/')}/{place})"

    return LINK.sub(replaced, markdown)


def _included(name: str, folder: Path) -> str:
    """A file of the root as part of a page in `folder`: what it links to is linked from there."""

    def moved(found: re.Match[str]) -> str:
        path = (ROOT / found["target"]).resolve()
        page = folder / path.name.lower()
        has_page = path.parent == ROOT and page.exists()
        return f"]({os.path.relpath(page if has_page else path, folder)}"

    return LOCAL.sub(moved, (ROOT / name).read_text(encoding="utf-8"))
