"""A hook of MkDocs: links from pages to files outside docs/, which the site does not hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger(__name__)
ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Point to the repository where its address is known, else leave the name of the file as text."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

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
