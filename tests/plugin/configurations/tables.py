"""All configurations by name, and the modules that have none."""

from __future__ import annotations

from importlib.util import find_spec

from tests.plugin.configurations import dense, experts, recurrent, wrappers
from tests.plugin.configurations.common import Configuration, module_of

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
CONFIGURATIONS = {name: own for name, own in _ALL.items() if find_spec(f"mlx_lm.models.{module_of(name)}")}

UNBUILDABLE: dict[str, str] = {
    "bitnet": "its linear layers are Metal kernels without a substitute",
    "muse_spark": "normalizes, rotates and gates in Metal kernels without a substitute",
    "olmo": "ends the process on import where the package ai2-olmo is missing",
    "phi3small": "writes to the logits of tokens up to 100351: a smaller vocabulary corrupts the heap",
}

# Where mlx-lm contradicts itself.
DIFFERS_WITHOUT_CACHE: dict[str, str] = {
    "gemma3n": "layers that share K and V compute their own where there is no cache",
}
DIFFERS_IN_BLOCKS: dict[str, str] = {
    "plamo3": "a block attends to a window of nine tokens, a cache of eight keeps eight",
}
