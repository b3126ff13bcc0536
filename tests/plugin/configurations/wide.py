"""The same configurations with heads that can be divided into groups of 32 features."""

from __future__ import annotations

from typing import Any

_WIDTHS = {
    "attention_head_dim",
    "attn_head_dim",
    "block_dim",
    "d_model",
    "global_head_dim",
    "head_dim",
    "hidden_size",
    "index_head_dim",
    "kv_channels",
    "kv_lora_rank",
    "n_embd",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "swa_head_dim",
    "swa_v_head_dim",
    "v_head_dim",
}
"""Entries that make heads wider."""
_FACTORS = {"long_factor", "short_factor"}
"""One number for each pair of rotated features."""
_SECTIONS = {"mrope_section", "xdrope_section"}
"""The numbers of pairs that the parts of a position rotate."""

STAY_NARROW = {"afm7", "phixtral", "plamo2"}
"""Their heads are of a fixed size, or follow from others of these entries."""


def widened(configuration: Any) -> Any:
    """Heads of 32 features in the place of 16 and 8."""
    if not isinstance(configuration, dict):
        return configuration
    return {name: _widened(name, value) for name, value in configuration.items()}


def _widened(name: str, value: Any) -> Any:
    if name in _WIDTHS and isinstance(value, int):
        return value * (4 if value == 8 else 2)
    if name in _FACTORS:
        return [factor for factor in value for _ in range(16 // len(value))]
    if name in _SECTIONS:
        return [2 * pairs for pairs in value]
    return widened(value)
