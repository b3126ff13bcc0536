"""Models with recurrent or convolutional layers, alone or among layers of attention."""

from __future__ import annotations

from tests.plugin.configurations.common import (
    EXPERTS,
    FULL,
    LATENT,
    LINEAR,
    SLIDING,
    WINDOW,
    Configuration,
    table,
)

_MAMBA: Configuration = {
    "intermediate_size": 128,
    "state_size": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_rank": 4,
}

PURE: dict[str, Configuration] = table(
    {},
    {
        "mamba": _MAMBA,
        "mamba:falcon": _MAMBA | {"model_type": "falcon_mamba"},
        "mamba2": {
            "num_heads": 4,
            "state_size": 16,
            "intermediate_size": 64,
            "conv_kernel": 4,
            "n_groups": 2,
            "use_conv_bias": True,
            "time_step_limit": (0.001, 100.0),
            "time_step_rank": "auto",
        },
        "rwkv7": {
            "head_dim": 16,
            "a_low_rank_dim": 8,
            "v_low_rank_dim": 8,
            "gate_low_rank_dim": 8,
            "decay_low_rank_dim": 8,
        },
    },
)

DELTA: Configuration = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}

_GRANITE: Configuration = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_conv_bias": True,
    "shared_intermediate_size": 32,
    "layer_types": ["mamba", "attention"],
}

CONVOLUTION: Configuration = {
    "num_hidden_layers": 3,
    "conv_bias": True,
    "conv_L_cache": 3,
    "layer_types": ["conv", FULL, "conv"],
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}

HYBRID: dict[str, Configuration] = table(
    EXPERTS,
    {
        "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
        "bailing_hybrid": LATENT
        | {"layer_group_size": 2, "group_norm_size": 2, "moe_router_enable_expert_bias": True},
        "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
        "bailing_moe_v3": LATENT
        | {
            "moe_shared_expert_intermediate_size": 32,
            "layer_group_size": 2,
            "rope_scaling": None,
        },
        "falcon_h1": {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 2,
            "lm_head_multiplier": 0.5,
        },
        "gear": {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, "conv_mixer", FULL],
            "conv_L_cache": 3,
            "rope_local_base_freq": 1000,
        },
        "granitemoehybrid": _GRANITE,
        "granitemoehybrid:dense": _GRANITE | {"num_local_experts": None, "position_embedding_type": "nope"},
        "jamba": {
            "num_hidden_layers": 4,
            "attn_layer_offset": 2,
            "attn_layer_period": 4,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 8,
            "mamba_expand": 2,
        },
        "kimi_linear": {
            **LATENT,
            "model_max_length": 512,
            "num_experts_per_token": 2,
            "linear_attn_config": {
                "num_heads": 4,
                "head_dim": 16,
                "kda_layers": [1],
                "short_conv_kernel_size": 4,
            },
            "num_expert_group": 2,
        },
        "lfm2": CONVOLUTION,
        "lfm2_moe": CONVOLUTION | {"use_expert_bias": True, "num_dense_layers": 1},
        "nemotron_h": {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": ["M", "*", "-", "E"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "use_conv_bias": True,
            "moe_shared_expert_intermediate_size": 32,
        },
        "olmo_hybrid": DELTA | {"layer_types": [LINEAR, FULL], "linear_allow_neg_eigval": True},
        "plamo2": {
            "num_hidden_layers": 4,
            "hidden_size_per_head": 16,
            "mamba_d_state": 16,
            "mamba_num_heads": 4,
            "attention_window_size": WINDOW,
            "full_attention_idx": [],
        },
        "qwen3_next": DELTA,
        "recurrent_gemma": {
            "num_hidden_layers": 3,
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "attention_window_size": WINDOW,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    },
)
