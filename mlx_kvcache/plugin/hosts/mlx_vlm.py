"""Describes mlx-vlm, version 0.7.

Its vision models are nested: a whole model computes the embeddings of a prompt with pictures, and calls the
language model inside it with a cache list. Its text models have the same form.
"""

from __future__ import annotations

from .host import Host

MLX_VLM = Host(
    name="mlx-vlm",
    package="mlx_vlm",
    versions="0.7.10",
    functions={
        "models.cache.make_prompt_cache": "model max_kv_size",
        "models.base.create_attention_mask": "h cache window_size return_array",
        "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
        "generate.ar._make_cache": "model left_padding",
    },
    commands=("generate", "chat", "server"),
    tools=".serving.mlx_vlm_tools",
    not_answered=frozenset(
        {
            "from_state",
            "step",
            "meta_state",
            # Its speculative decoding goes back by `trim` instead.
            "start_speculation",
            "record_speculative_states",
            "record_speculative_window",
            "validate_speculation",
            "commit_speculation",
            "abort_speculation",
            # Only its prefix cache, which is replaced while a model is attached, asks for these.
            "memory_profile",
            "dequantize_for_apc",
            "prefix_cache_snapshot",
            "prefix_cache_restore",
            "prefix_cache_reserve",
            "prefix_cache_merge",
        }
    ),
    inner="language_model",
)
