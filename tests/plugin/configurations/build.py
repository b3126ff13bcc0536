"""Models with random weights from the configurations."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from tests.plugin.configurations.common import module_of
from tests.plugin.configurations.tables import CONFIGURATIONS
from tests.plugin.configurations.wide import widened


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


# The step from one layer of experts to the next in llama4, and the first of deepseek_v3.
_WITHOUT_EXPERTS = {"interleave_moe_layer_step": 99, "first_k_dense_replace": 99}


def build(name: str, seed: int = 0, is_wide: bool = False, is_dense: bool = False) -> nn.Module:
    """The model of a configuration, or of it with wider heads or no experts, with random float32 weights."""
    module = importlib.import_module(f"mlx_lm.models.{module_of(name)}")
    # Some models write into the dictionaries that they are given.
    configuration = copy.deepcopy(CONFIGURATIONS[name])
    if is_dense:
        configuration.get("text_config", configuration).update(_WITHOUT_EXPERTS)
    arguments = module.ModelArgs.from_dict(widened(configuration) if is_wide else configuration)
    model: nn.Module = module.Model(arguments)
    randomize(model, seed)
    model.eval()
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, norms and biases too: those of one and zero hide faults."""
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    model.update(tree_map_with_path(lambda path, array: _draw(path, array, next(keys)), model.parameters()))
    mx.eval(model.parameters())


# What decides how fast a recurrent layer forgets. As the models set them first most forget within
# five tokens, so that a state kept wrongly would not show; and some set them at random.
_FORGETTING = {
    "A_log": (0.0, 0.5),
    "dt_bias": (-3.0, 0.3),
    "dt_proj.bias": (-3.0, 0.3),
    "w_lora.lora.2.bias": (-3.0, 0.3),
    "recurrent_param": (-4.0, 0.3),
}
# Scales of whole matrices, which start at zero in limite.
_SCALES = {"o_scale", "post_lambda_attn", "qkv_scale"}
# The shares of the token before in each of RWKV's inputs.
_SHIFT = re.compile(r"\.x_[rwkvag]$")


def _draw(path: str, array: mx.array, key: mx.array) -> mx.array:
    """A random array in the place of one that the model has made."""
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape, mx.uint32, key=key)  # packed weights
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    noise = mx.random.normal(array.shape, key=key)
    for ending, (mean, deviation) in _FORGETTING.items():
        if path.endswith("." + ending):
            return mean + deviation * noise
    if path.rpartition(".")[2] in _SCALES:
        return 1.0 + 0.1 * noise
    if _SHIFT.search(path):
        return 0.5 + 0.2 * noise
    owner = path.removesuffix(".weight")
    if array.ndim > 1 and "conv" in path:
        scale: float = (array.shape[0] / array.size) ** 0.5
        return noise * scale
    if array.ndim > 1 and owner != path and "norm" not in owner.rpartition(".")[2]:
        scale = array.shape[-1] ** -0.5
        return noise * scale
    return array.astype(mx.float32) + 0.1 * noise
