"""Describes mlx-lm, versions 0.31.3 to 0.32."""

from __future__ import annotations

from .host import Host

MLX_LM = Host(
    name="mlx-lm",
    package="mlx_lm",
    versions="0.31.3 to 0.32.2",
    functions={
        "models.cache.make_prompt_cache": "model max_kv_size",
        "models.cache.save_prompt_cache": "file_name cache metadata",
        "models.cache.LRUPromptCache.fetch_nearest_cache": "self model tokens",
        "models.cache.LRUPromptCache.insert_cache": "self model tokens prompt_cache cache_type",
        "models.cache.PromptTrie.search": "self model tokens",
        "models.cache.PromptTrie.get": "self model tokens",
        "models.cache.PromptTrie.add": "self model tokens value",
        "models.cache.PromptTrie.pop_prefixes": "self model tokens",
        "models.base.create_attention_mask": "h cache window_size return_array",
        "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
    },
    # Loading a file makes caches of mlx-lm, `step` is internal, and `Host.entry` adds `meta_state`.
    not_answered=frozenset({"from_state", "step", "meta_state"}),
)
