"""All configurations by name, and the modules that have none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TypeVar

from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from tests.plugin.configurations import dense, experts, recurrent, wrappers
from tests.plugin.configurations.common import Configuration, module_of

T = TypeVar("T")


def _installed(table: dict[str, T]) -> dict[str, T]:
    """What the installed mlx-lm has modules for."""
    return {name: own for name, own in table.items() if find_spec(f"mlx_lm.models.{module_of(name)}")}


_ALL: dict[str, Configuration] = (
    dense.FULL_ATTENTION
    | dense.WINDOWED
    | dense.SHARING
    | experts.PLAIN
    | experts.WINDOWED
    | experts.LATENT_ATTENTION
    | experts.COMPRESSED
    | recurrent.PURE
    | recurrent.HYBRID
    | wrappers.WRAPPERS
)
# "module" or "module:variant". Older releases of mlx-lm do not have all of these.
CONFIGURATIONS = _installed(_ALL)
MISSING = _ALL.keys() - CONFIGURATIONS.keys()

KINDS = ["llama", "llama:window", "gemma3_text", "plamo3", "gpt_oss", "llama4", "gemma3n", "deepseek_v3"]
KINDS += ["deepseek_v32", "longcat_flash", "mamba2", "rwkv7", "falcon_h1", "kimi_linear", "qwen3_next"]
"""One of each kind: full attention, windows, both, chunks, shared layers, latents, an index beside them, two
caches in one layer, recurrences, and recurrences beside attention."""


def chosen(names: Iterable[str], kinds: Iterable[str] = KINDS) -> list[str]:
    """One of each kind, or all names if the environment has ARCHITECTURES=all (`make test-architectures`)."""
    return list(names if os.environ.get("ARCHITECTURES") == "all" else kinds)


UNBUILDABLE: dict[str, str] = _installed(
    {
        "bitnet": "its linear layers are Metal kernels without a substitute",
        "muse_spark": "normalizes, rotates and gates in Metal kernels without a substitute",
        "olmo": "ends the process on import where the package ai2-olmo is missing",
        "phi3small": "writes to the logits of tokens up to 100351: a smaller vocabulary corrupts the heap",
    }
)

# Where mlx-lm contradicts itself.
DIFFERS_WITHOUT_CACHE: dict[str, str] = {
    "gemma3n": "layers that share K and V compute their own where there is no cache",
}
DIFFERS_IN_BLOCKS: dict[str, str] = _installed(
    {
        "plamo3": "a block attends to a window of nine tokens, a cache of eight keeps eight",
    }
)
# What later releases have mended. Nothing can be compared with mlx-lm's own caches for these.
FAULTY: dict[str, str] = {}
if MLX_LM.version.startswith("0.31."):
    DIFFERS_WITHOUT_CACHE["falcon_h1"] = "without a cache only one layer runs"
    FAULTY = {
        "gemma3n": "layers that share K and V rotate queries as if the block had been read already",
        "llama4": "a cache of chunks drops tokens by the length of its buffer",
    }
