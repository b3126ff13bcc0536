"""Describes mlx-lm, versions 0.31.3 to 0.32.

A model itself is called with a cache list: no other model is nested in it. Versions differ in how caches are
saved: in 0.31 the numbers of a cache are in its `meta_state`, in 0.32 they are in its `state`, as
`Host.keeps_numbers_apart` tells. Files of both are read by `mlx_lm_files.py`.
"""

from __future__ import annotations

from .host import Host

MLX_LM = Host(
    name="mlx-lm",
    package="mlx_lm",
    versions="0.31.3 to 0.32.2",
    functions={
        # Replaced while a model is attached.
        "models.cache.make_prompt_cache": "model max_kv_size",
        "models.cache.save_prompt_cache": "file_name cache metadata",
        # The server's store of prompts, which looks for conversations in a trie.
        "models.cache.LRUPromptCache.fetch_nearest_cache": "self model tokens",
        "models.cache.LRUPromptCache.insert_cache": "self model tokens prompt_cache cache_type",
        "models.cache.PromptTrie.search": "self model tokens",
        "models.cache.PromptTrie.get": "self model tokens",
        "models.cache.PromptTrie.add": "self model tokens value",
        "models.cache.PromptTrie.pop_prefixes": "self model tokens",
        # Called by models with the arrays that entries return.
        "models.base.create_attention_mask": "h cache window_size return_array",
        "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
    },
    not_answered=frozenset(
        {
            # Loading a file makes caches of mlx-lm.
            "from_state",
            # By how much its buffers grow.
            "step",
            # `Host.entry` adds it where a version has it.
            "meta_state",
        }
    ),
)
