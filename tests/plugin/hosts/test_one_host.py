"""The plug-in needs one host only: each serves its models where the other is not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BLOCKED = "import sys; sys.modules['{missing}'] = None\n"
"""Importing a module raises ImportError from then on, as if it was not installed."""
MODELS = {
    "mlx_lm": """
from mlx_lm.models.llama import Model, ModelArgs
model = Model(ModelArgs.from_dict(options))
""",
    "mlx_vlm": """
from mlx_vlm.models.llama.config import ModelConfig
from mlx_vlm.models.llama.language import LanguageModel
model = LanguageModel(ModelConfig.from_dict(options))
""",
}
OPTIONS = """
import mlx.core as mx
mx.disable_compile()
options = dict(
    model_type="llama", vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=64,
)
"""
USE = """
import importlib
from mlx_kvcache.plugin import PromptCache, attach, make_prompt_cache
cache = make_prompt_cache(model)
model(mx.array([[1, 2, 3]]), cache=cache)
cache.fork().rewind(1)
cache.remove(0, 1)
cache.save("saved")
assert PromptCache.load("saved", model).position == 2
theirs = importlib.import_module(type(model).__module__.partition(".")[0] + ".models.cache")
with attach(model):
    assert type(theirs.make_prompt_cache(model)) is PromptCache
assert type(theirs.make_prompt_cache(model)) is list
"""
COMMAND = """
import runpy
sys.argv[1:] = ["--host", "mlx-lm", "generate"]
runpy.run_module("mlx_kvcache.plugin", run_name="__main__", alter_sys=True)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("host", "missing"), [("mlx_lm", "mlx_vlm"), ("mlx_vlm", "mlx_lm")])
def test_a_host_without_the_other(host: str, missing: str, tmp_path: Path) -> None:
    if find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    done = run(BLOCKED.format(missing=missing) + OPTIONS + MODELS[host] + USE, tmp_path)
    # The model dies at the end of the process, when modules are gone.
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_without_its_host(tmp_path: Path) -> None:
    done = run(BLOCKED.format(missing="mlx_lm") + COMMAND, tmp_path)
    assert done.returncode == 2
    assert "error: mlx-lm is not installed: pip install mlx-lm" in done.stderr
