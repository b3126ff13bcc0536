"""Models with attention and a dense feed-forward part."""

from __future__ import annotations

from tests.plugin.configurations.common import (
    FULL,
    LATENT,
    SLIDING,
    VOCABULARY,
    WINDOW,
    YARN,
    Configuration,
    table,
)

_LLAMA3: Configuration = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG: Configuration = {
    "rope_type": "longrope",
    "type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}
_DYNAMIC: Configuration = {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}

FULL_ATTENTION: dict[str, Configuration] = table(
    {},
    {
        "apertus": {"post_norm": True, "qk_norm": True},
        "cohere": {"logit_scale": 0.25},
        "ernie4_5": {},
        "exaone": {"num_layers": 2},
        "gemma": {},
        "gemma2": {"query_pre_attn_scalar": 16.0},
        "glm": {},
        "glm4": {"partial_rotary_factor": 0.5},
        "granite": {
            "logits_scaling": 2.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
        },
        "helium": {},
        "hunyuan_v1_dense": {"rope_scaling": _DYNAMIC},
        "internlm2": {"bias": True},
        "internlm3": {"qkv_bias": True},
        "llama": {},
        "llama:llama3": {"rope_scaling": _LLAMA3},
        "llama:longrope": {"rope_scaling": _LONG},
        "llama:tied": {"tie_word_embeddings": True},
        "llama:traditional": {"rope_traditional": True, "attention_bias": True, "mlp_bias": True},
        "llama:yarn": {"rope_scaling": YARN},
        # The third layer does not rotate.
        "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 3},
        "mimo": {},
        "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 2.0},
        "minicpm3": {
            "dim_model_base": 64,
            "scale_depth": 1.4,
            "scale_emb": 2.0,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "rope_scaling": _LONG | {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
        },
        "nanochat": {"num_key_value_heads": 2},
        "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
        "olmo2": {},
        "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
        "phi3": {"rope_scaling": _LONG, "original_max_position_embeddings": 64},
        "plamo": {"n_shared_head": 2},
        "qwen": {"kv_channels": 16, "num_key_value_heads": 4},
        "qwen2": {},
        "qwen2:yarn": {"rope_scaling": YARN},
        "qwen3": {},
        "seed_oss": {"attention_bias": True, "attention_out_bias": True},
        "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": True},
        "starcoder2": {},
        "talkie": {"num_key_value_heads": 4},
        "telechat3": {},
        "youtu_llm": LATENT,
        # Configurations with names of their own.
        "gpt2": {"n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128},
        "gpt_bigcode": {
            "n_embd": 64,
            "n_layer": 2,
            "n_inner": 96,
            "n_head": 4,
            "n_positions": 128,
            "num_key_value_heads": None,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "gpt_neox": {"num_key_value_heads": 4, "rotary_emb_base": 10000, "rotary_pct": 0.5},
        "gptj": {"n_embd": 64, "n_positions": 128, "n_head": 4, "rotary_dim": 8, "n_layer": 2},
        "lille-130m": {"block_size": 128, "n_layer": 2, "n_head": 4, "n_kv_heads": 2, "n_embd": 64},
        "openelm": {
            "num_transformer_layers": 2,
            "model_dim": 64,
            "ffn_dim_divisor": 16,
            "ffn_multipliers": [1.0, 1.5],
            "num_query_heads": [4, 6],
            "num_kv_heads": [2, 3],
        },
    },
)

WINDOWED: dict[str, Configuration] = table(
    {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    {
        "llama:window": {},
        "cohere2": {"sliding_window_pattern": 3, "logit_scale": 0.25},
        "exaone4": {"num_hidden_layers": 4, "sliding_window_pattern": "LLGL", "rope_scaling": None},
        "gemma3_text": {
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 1000.0,
        },
        "ministral3": {
            "rope_parameters": {
                "type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
        "muse_glimmer": {"post_norm_eps": 1e-8, "qk_scale_factor": 3.87, "output_multiplier": 0.5},
        "olmo3": {},
        "plamo3": {"window_size": WINDOW, "sliding_window_pattern": 2},
        "spark2_5": {
            "rope_parameters": {
                SLIDING: {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                FULL: {"rope_theta": 100000.0, "partial_rotary_factor": 0.25},
            },
        },
    },
)

_GEMMA4: Configuration = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 100000.0},
        SLIDING: {"rope_theta": 10000.0},
    },
}

# Layers that read other layers' K and V, layers run twice, and layers left out.
SHARING: dict[str, Configuration] = table(
    {},
    {
        "afm7": {
            "hidden_dim": 64,
            "num_layers": 4,
            "num_kv_reuse_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "hidden_dim_scale_factor": 1.5,
        },
        "gemma4_text": _GEMMA4,
        # Keys that serve as values too, experts, and no sharing between layers.
        "gemma4_text:experts": _GEMMA4
        | {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
        "nanbeige": {"num_loops": 2},
        "nemotron-nas": {
            "num_hidden_layers": 3,
            "block_configs": [
                {
                    "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                    "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
                },
                {
                    "attention": {"no_op": True, "replace_with_linear": False},
                    "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
                },
                {
                    "attention": {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False},
                    "ffn": {"no_op": True, "replace_with_linear": False},
                },
            ],
        },
    },
)
