"""All configurations by name, and the modules that have none."""

from __future__ import annotations

from tests.plugin.configurations import dense, experts, recurrent, wrappers
from tests.plugin.configurations.common import Configuration

# "module" or "module:variant".
CONFIGURATIONS: dict[str, Configuration] = (
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

UNBUILDABLE: dict[str, str] = {
    "bitnet": "its linear layers are a Metal kernel without a substitute",
    "olmo": "ends the process on import where the package ai2-olmo is missing",
    "phi3small": "masks token ids up to 100351, so that a smaller vocabulary is written out of bounds",
}
