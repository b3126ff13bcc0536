"""Models with random weights from the configurations."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from tests.plugin.configurations.tables import CONFIGURATIONS


def module_of(name: str) -> str:
    """The model module of a configuration, whose name may add a variant."""
    return name.partition(":")[0]


@cache
def model_modules() -> list[str]:
    """mlx-lm's modules that have a `Model` and its `ModelArgs`.

    They are read and not imported: some end the process where a package is missing.
    """
    package = importlib.util.find_spec("mlx_lm.models")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(next(iter(package.submodule_search_locations)))
    return sorted(file.stem for file in folder.glob("*.py") if _names(file) >= {"Model", "ModelArgs"})


def _names(file: Path) -> set[str]:
    """The classes that a module defines or imports."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def build(name: str, seed: int = 0) -> nn.Module:
    """The model of a configuration with random float32 weights."""
    module = importlib.import_module(f"mlx_lm.models.{module_of(name)}")
    # Some models write into the dictionaries that they are given.
    arguments = module.ModelArgs.from_dict(copy.deepcopy(CONFIGURATIONS[name]))
    model: nn.Module = module.Model(arguments)
    _randomise(model, seed)
    model.eval()
    return model


def _randomise(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, norms and biases too: those of one and zero hide faults."""
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))

    def draw(path: str, array: mx.array) -> mx.array:
        key = next(keys)
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = mx.random.normal(array.shape, key=key)
        if path.endswith(".weight") and array.ndim > 1:
            inputs = array.size // array.shape[0] if "conv" in path else array.shape[-1]
            return noise * inputs**-0.5
        return array.astype(mx.float32) + 0.1 * noise

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
