"""Models around a text model's configuration."""

from __future__ import annotations

from tests.plugin.configurations import dense, experts, recurrent
from tests.plugin.configurations.common import (
    COMMON,
    EXPERTS,
    FULL,
    LATENT,
    SLIDING,
    VOCABULARY,
    WINDOW,
    Configuration,
    around,
)

_GEMMA3N: Configuration = COMMON | {
    "model_type": "gemma3n",
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "rope_local_base_freq": 1000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "altup_coef_clip": 1.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}

# Three layers in chunks, the fourth full and without rotation.
_LLAMA4: Configuration = (
    COMMON
    | EXPERTS
    | {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "rope_scaling": None,
        "floor_scale": 16,
    }
)

_QWEN3_5: Configuration = (
    COMMON
    | recurrent.DELTA
    | {
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
    }
)

_KIMI_K3: Configuration = (
    COMMON
    | EXPERTS
    | LATENT
    | {
        "model_type": "kimi_linear",
        "num_hidden_layers": 4,
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3, 4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
            "use_full_rank_gate": True,
        },
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True,
        "attn_res_block_size": 2,
    }
)

_MINIMAX_M3: Configuration = (
    COMMON
    | EXPERTS
    | {
        "model_type": "minimax_m3_vl",
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "moe_layer_freq": None,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": [FULL, "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        # Two blocks of four tokens are attended to, fewer than a test feeds.
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
    }
)

# Two-bit weights, whose groups of 128 values set the least sizes.
_HADAMARD: Configuration = _QWEN3_5 | {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
    "linear_value_head_dim": 32,
    "num_hidden_layers": 2,
}

WRAPPERS: dict[str, Configuration] = {
    "gemma3": around(dense.WINDOWED["gemma3_text"], model_type="gemma3"),
    "gemma3n": around(_GEMMA3N, model_type="gemma3n"),
    "gemma4": around(dense.SHARING["gemma4_text"], model_type="gemma4"),
    "kimi_k25": around(experts.LATENT_ATTENTION["deepseek_v3"], model_type="kimi_k25"),
    "kimi_k3": around(_KIMI_K3, model_type="kimi_k3"),
    "kimi_vl": around(experts.LATENT_ATTENTION["deepseek_v3"], model_type="kimi_vl"),
    "lfm2-vl": around(recurrent.HYBRID["lfm2"], model_type="lfm2-vl"),
    "llama4": around(_LLAMA4, model_type="llama4"),
    "llama4_text": _LLAMA4 | {"no_rope_layers": [1, 1, 1, 0]},
    "minimax_m3_vl": around(_MINIMAX_M3, model_type="minimax_m3_vl"),
    "mistral3": around(dense.WINDOWED["ministral3"], model_type="mistral3"),
    "mistral3:llama": around(dense.FULL_ATTENTION["llama"], model_type="mistral3"),
    "mistral3:mistral4": around(experts.LATENT_ATTENTION["mistral4"], model_type="mistral3"),
    "pixtral": around(dense.FULL_ATTENTION["llama"], model_type="pixtral"),
    "prism_hadamard_qwen35": around(
        _HADAMARD,
        model_type="prism_hadamard_qwen35",
        schema_version=1,
        tensor_namespace="mlx-lm-text",
        quantization={"bits": 2, "group_size": 128, "mode": "affine"},
        modules=[
            {"path": "model.layers.1.self_attn.o_proj", "block": 0, "embedding": False, "dtype": "float16"},
        ],
    ),
    "qwen2_vl": around(dense.FULL_ATTENTION["qwen2"], model_type="qwen2_vl"),
    "qwen3_5": around(_QWEN3_5, model_type="qwen3_5"),
    "qwen3_5_moe": around(_QWEN3_5 | EXPERTS, model_type="qwen3_5_moe"),
    "qwen3_vl": around(dense.FULL_ATTENTION["qwen3"], model_type="qwen3_vl"),
    "qwen3_vl_moe": around(experts.PLAIN["qwen3_moe"], model_type="qwen3_vl_moe"),
}
