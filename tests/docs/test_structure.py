"""structure.md has a line for every module of the package, and for no other."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, ROOT

PACKAGE = ROOT / "mlx_kvcache"


def told() -> list[str]:
    """The modules that the table names, one a line."""
    return re.findall(
        r"^\| `([\w/]+\.py)` \| .+ \|$", (DOCS / "structure.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_every_module_is_named_once() -> None:
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    # What only says what is in a folder is the folder's.
    own = sorted(module for module in modules if not module.endswith("__init__.py"))
    assert sorted(told()) == own
