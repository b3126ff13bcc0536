"""What the configurations share.

`ModelArgs.from_dict` and the inner `TextArgs.from_dict` drop the keys that they do not know, so one
dictionary serves them all, and a table lists only what is particular to an architecture.
"""

from __future__ import annotations

from typing import Any

Configuration = dict[str, Any]

VOCABULARY = 96
WINDOW = 8
FULL = "full_attention"
SLIDING = "sliding_attention"
LINEAR = "linear_attention"

COMMON: Configuration = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "sliding_window": WINDOW,
}

# Of four experts two are taken, so a fault in the routing shows.
EXPERTS: Configuration = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

# Attention by way of a latent vector.
LATENT: Configuration = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

YARN: Configuration = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}


def table(shared: Configuration, entries: dict[str, Configuration]) -> dict[str, Configuration]:
    """The entries, each on top of what all have and of what is shared."""
    return {
        name: COMMON | shared | {"model_type": name.partition(":")[0]} | own for name, own in entries.items()
    }


def around(text: Configuration, **outer: Any) -> Configuration:
    """A configuration with the text model's inside."""
    return {"text_config": text, "vocab_size": text["vocab_size"], **outer}


def module_of(name: str) -> str:
    """The model module of a configuration, whose name may add a variant."""
    return name.partition(":")[0]
