"""Models with a mixture of experts, and those that attend by way of a latent vector."""

from __future__ import annotations

from tests.plugin.configurations.common import (
    EXPERTS,
    FULL,
    LATENT,
    SLIDING,
    VOCABULARY,
    WINDOW,
    YARN,
    Configuration,
    table,
)

PLAIN: dict[str, Configuration] = table(
    EXPERTS,
    {
        "Klear": {},
        "bailing_moe": {"use_qk_norm": True, "moe_router_enable_expert_bias": True},
        "dbrx": {
            "d_model": 64,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000},
            "n_layers": 2,
            "n_heads": 4,
        },
        "deepseek": {},
        "dots1": {},
        "ernie4_5_moe": {
            "moe_num_experts": 4,
            "moe_layer_start_index": 1,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        },
        "glm4_moe": {"rope_scaling": None, "partial_rotary_factor": 0.5},
        "granitemoe": {
            "logits_scaling": 2.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
        },
        # Every second layer reads the K and V of the one before.
        "hunyuan": {
            "num_hidden_layers": 4,
            "moe_topk": 2,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        },
        "minimax": {"num_key_value_heads": 2, "shared_intermediate_size": 32, "rotary_dim": 8},
        "mixtral": {},
        "olmoe": {},
        "phimoe": {
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [2.0] * 8,
                "short_factor": [1.0] * 8,
                "long_mscale": 1.2,
                "short_mscale": 1.2,
                "original_max_position_embeddings": 64,
            },
        },
        "phixtral": {
            "num_vocab": VOCABULARY,
            "model_dim": 64,
            "num_heads": 4,
            "num_layers": 2,
            "rotary_dim": 8,
        },
        "qwen2_moe": {},
        "qwen3_moe": {},
        "solar_open": {"partial_rotary_factor": 1.0},
    },
)

WINDOWED: dict[str, Configuration] = table(
    EXPERTS | {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    {
        "afmoe": {"num_dense_layers": 1},
        "exaone_moe": {"is_moe_layer": [False, True, True]},
        "gpt_oss": {},
        "laguna": {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_attention_heads_per_layer": [4, 4, 2],
            "rope_parameters": {
                FULL: YARN | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                SLIDING: {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
            },
        },
        "mellum": {
            "rope_parameters": {
                FULL: YARN | {"rope_theta": 10000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
        "mimo_v2_flash": {
            "hybrid_layer_pattern": [1, 0, 1],
            "moe_layer_freq": [0, 1, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": WINDOW,
            "swa_rope_theta": 1000.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 16,
            "v_head_dim": 8,
            "swa_v_head_dim": 8,
            "partial_rotary_factor": 0.5,
            "attention_value_scale": 0.7,
        },
        "step3p5": {
            "num_attention_groups": 2,
            "rope_theta": [10000.0, 10000.0, 1000.0],
            "partial_rotary_factors": [1.0, 0.5, 1.0],
            "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 1},
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "share_expert_dim": 32,
            "moe_layers_enum": "1,2",
        },
    },
)

_FLASH: Configuration = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

# A sparse indexer chooses eight tokens, fewer than a test feeds.
_INDEX: Configuration = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}

LATENT_ATTENTION: dict[str, Configuration] = table(
    EXPERTS | LATENT,
    {
        "deepseek_v2": {"topk_method": "group_limited_greedy", "rope_scaling": YARN},
        "deepseek_v2:lite": {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_scaling": YARN | {"mscale": 1.0},
        },
        "deepseek_v3": {},
        "deepseek_v3:yarn": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        "deepseek_v32": _INDEX,
        "glm4_moe_lite": {},
        "glm_moe_dsa": _INDEX | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "longcat_flash": _FLASH,
        "longcat_flash_ngram": _FLASH
        | {"ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
        "mistral4": {
            "rope_parameters": YARN
            | {
                "rope_theta": 10000.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
    },
)

# Compresses K and V, and shares them and the chosen tokens between layers. Sizes that are no
# multiples of 32 keep it from rounding to eight bits, where tiny differences become large ones.
COMPRESSED: dict[str, Configuration] = table(
    EXPERTS,
    {
        "deepseek_v41": {
            "num_hidden_layers": 6,
            "head_dim": 24,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 16,
            "scoring_func": "sqrtsoftplus",
            "sliding_window": 4,
            "compress_ratios": (0, 2, 2, 2, 1, 1),
            "kv_source_layer_ids": (1, 4),
            "index_source_layer_ids": (1, 2, 4, 5),
            "index_n_heads": 4,
            "index_head_dim": 24,
            "index_topk": 3,
            "candidate_source_layer_id": 4,
            "candidate_topk_blocks": 2,
            "candidate_block_size": 2,
        },
    },
)
