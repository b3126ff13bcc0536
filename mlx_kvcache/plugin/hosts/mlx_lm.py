"""Describes mlx-lm, versions 0.31.3 to 0.32.

What differs between these versions is found by looking at the classes, not at the number:

- In 0.31 the `state` of a cache has only its arrays, and its `meta_state` the numbers, such as the offset. In
  0.32 the `state` has both (`Host.keeps_numbers_apart`).
- In 0.31 layers that use another layer's keys and values read them from its `state`, in 0.32 by
  `keys_and_values`.
- In 0.31 `save_prompt_cache` writes another format; `mlx_lm_files.py` reads both.
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
        "generate.stream_generate": "model tokenizer prompt",
        # Replaced, because the server's store asks whether a cache can be trimmed, but not by how much.
        "models.cache.LRUPromptCache.fetch_nearest_cache": "self model tokens",
        "models.cache.LRUPromptCache.insert_cache": "self model tokens prompt_cache cache_type",
        "models.cache.PromptTrie.search": "self model tokens",
        "models.cache.PromptTrie.get": "self model tokens",
        "models.cache.PromptTrie.add": "self model tokens value",
        "models.cache.PromptTrie.pop_prefixes": "self model tokens",
        # Called by models.
        "models.base.create_attention_mask": "h cache window_size return_array",
        # Replaced in the modules of a model, so that each row of a batch attends to its own keys.
        "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
    },
    commands=("generate", "chat", "server", "cache_prompt"),
    tools=".serving.mlx_lm_server",
    # Loading a file makes caches of mlx-lm, `step` is internal, and `Host.entry` adds `meta_state`.
    not_answered=frozenset({"from_state", "step", "meta_state"}),
)
