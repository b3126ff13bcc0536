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
        # Replaced while a model is attached; the modules of `plugin/serving/mlx_vlm_*.py` say why.
        "models.cache.make_prompt_cache": "model max_kv_size",
        "generate.ar._make_cache": "model left_padding kv_bits kv_key_bits kv_value_bits",
        "generate.ar._extend_cache": "cache_a cache_b",
        "generate.ar.generate_step": "input_ids model pixel_values mask",
        "generate.ar.BatchGenerator.insert": "self prompts max_tokens prompt_kwargs",
        "generate.ar.BatchGenerator._apc_extra_hash": "self prompt_kwargs",
        "generate.ar.BatchGenerator._apc_pick_for": "self sequence",
        "generate.ar.BatchGenerator._build_mixed_prompt_batch": "self sequences",
        "generate.ar.PromptProcessingBatch.generate": "self",
        "generate.ar.PromptProcessingBatch.remove": "self uid",
        "generate.ar.GenerationBatch._step": "self",
        "generate.ar.GenerationBatch.extend": "self other",
        "generate.ar.GenerationBatch.filter": "self keep",
        "generate.common.maybe_quantize_kv_cache": "prompt_cache quantized_kv_start kv_group_size kv_bits",
        "generate.common.PromptCacheState.update": "self token_ids kv_cache",
        "generate.common.PromptCacheState.find_prefix_length": "self new_ids",
        "generate.dispatch._prefix_cache_trim_amount": "kv_cache prefix_len",
        "generate.dispatch._prepare_generation_inputs": "model processor prompt image audio video kwargs",
        "apc.semantic_extra_hash": "tenant image_hash media model processor",
        "apc.classify_layer_for_apc": "c",
        "apc.APCCoordinator": "manager model",
        "apc.APCManager.clear": "self",
        "apc.APCManager.close": "self",
        "apc.APCManager.stats_snapshot": "self",
        "speculative.cache_state.start_speculative_cache": "caches length cache_types",
        "speculative.utils.make_speculative_prompt_cache": "lm draft_kind",
        "speculative.dflash._dflash_verify": "lm inputs cache capture_layer_ids",
        "speculative.dflash._dflash_verify_greedy": "lm verify_input prompt_cache target_layer_ids sampler",
        "speculative.drafters.validate_drafter_compatibility": "target_model draft_model draft_kind",
        "server.generation.ResponseGenerator._initialize_model": "self",
        "server.generation.ResponseGenerator._preprocess_request": "self prompt images audio videos",
        "server.generation.ResponseGenerator.generate": "self prompt images audio",
        "server.generation.ResponseGenerator.validate_context_budget": "self prompt images audio args videos",
        # Called by models.
        "models.base.create_attention_mask": "h cache window_size return_array",
        "models.base.scaled_dot_product_attention": "queries keys values cache scale mask sinks",
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
