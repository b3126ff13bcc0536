"""The modules of mlx-vlm that have a language model."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def language_modules() -> list[str]:
    """The folders of `mlx_vlm/models` whose `language.py` defines a class `LanguageModel`.

    A folder that imports the class from another folder, such as `smolvlm` or `solar_open`, wraps the
    other's language model and does not count. Nor does a class elsewhere: that of `sam3` encodes texts
    in `text_encoder.py`. The files are read and not imported, since some end the process on import.
    """
    package = importlib.util.find_spec("mlx_vlm.models")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(next(iter(package.submodule_search_locations)))
    return sorted(file.parent.name for file in folder.glob("*/language.py") if _defines_model(file))


def _defines_model(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.ClassDef) and node.name == "LanguageModel" for node in tree.body)
