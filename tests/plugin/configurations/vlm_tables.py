"""Configurations of mlx-vlm's language models by name, and the modules that have none.

A configuration with a `text_config` is that of a vision model, whose `LanguageModel` takes a
`TextConfig`; the others are those of text models, whose `LanguageModel` takes a `ModelConfig`.
"""

from __future__ import annotations

from tests.plugin.configurations import dense, experts, recurrent, wrappers
from tests.plugin.configurations.common import (
    COMMON,
    EXPERTS,
    FULL,
    LATENT,
    LINEAR,
    SLIDING,
    VOCABULARY,
    WINDOW,
    Configuration,
    around,
    module_of,
    table,
)
from tests.plugin.configurations.tables import CONFIGURATIONS
from tests.plugin.configurations.vlm_modules import language_modules

# mlx-vlm's names of modules of mlx-lm.
_RENAMED = {
    "Klear": "klear",
    "lfm2-vl": "lfm2_vl",
    "lille-130m": "lille_130m",
    "nemotron-nas": "nemotron_nas",
}
_FROM_MLX_LM: dict[str, Configuration] = {
    _RENAMED.get(name, name): configuration
    for name, configuration in CONFIGURATIONS.items()
    if _RENAMED.get(module_of(name), module_of(name)) in language_modules()
}

# mlx-vlm passes a vision model's language model less than mlx-lm's: it has a `TextConfig` with fewer
# defaults, and the rotary angles have sections for the time, height and width of a position.
_LLAMA = dense.FULL_ATTENTION["llama"]
_QWEN2 = dense.FULL_ATTENTION["qwen2"]
_SECTIONS = {"type": "default", "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_PARTIAL_SECTIONS = _SECTIONS | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_QWEN3_5: Configuration = (
    COMMON | recurrent.DELTA | {"model_type": "qwen3_5_text", "rope_parameters": _PARTIAL_SECTIONS}
)
_QWEN3_5_MOE: Configuration = _QWEN3_5 | EXPERTS | {"model_type": "qwen3_5_moe_text"}
_INDEX: Configuration = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}

_TEXT: dict[str, Configuration] = table(
    EXPERTS,
    {
        "cohere2_moe": {
            "num_hidden_layers": 4,
            "sliding_window_pattern": 2,
            "logit_scale": 0.25,
            "prefix_dense_intermediate_size": 96,
        },
        "deepseek_v4": {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_key_value_heads": 1,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 16,
            "scoring_func": "sqrtsoftplus",
            "num_hash_layers": 1,
            # Layers without compression, and with it by 4, where eight blocks are chosen, and by 128.
            "compress_ratios": [0, 4, 128, 4],
            "index_n_heads": 4,
            "index_head_dim": 24,
            "index_topk": 8,
        },
        # Without n-grams, whose hashes come from a tokenizer.
        "deepseek_v41": experts.COMPRESSED["deepseek_v41"] | {"engram_layer_ids": []},
        "flint": {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "no_rope_layer_indices": [1],
            "mlp_only_layers": [0],
        },
        "hrm_text": {"num_key_value_heads": 4, "num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1},
        "hy_v4": LATENT | _INDEX | {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
        "k2_horizon": {},
        "kolibri1": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
        "limite": {
            "num_hidden_layers": 4,
            "attn_gate_channels": 8,
            "ve_dim": 8,
            "ve_gate_channels": 4,
            "ve_layers": [1, 3],
            "xsa_layers": [2, 3],
            "global_layers": [1],
            "rope_n_pairs": 4,
            "mudd_inter": 8,
            "mudd_layers": [2, 3],
            "mudd_tap_idx": {"2": [0, 1], "3": [0, 1, 2]},
            "softcap_logits": {"kind": "sigmoid", "a": 20.0, "b": 1.0, "c": 2.0},
        },
        "longcat_flash_sparse": LATENT
        | _INDEX
        | {
            "ffn_hidden_size": 96,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 2,
            "num_layers": 2,
            "index_init_tokens": 2,
            "index_local_tokens": 2,
            "cli_factor": 2,
            "oe_vocab_size_ratio": 2,
            "oe_neighbor_num": 3,
            "oe_split_num": 2,
        },
        "nemotron_labs_diffusion": {},
        "olmo": {
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "mlp_hidden_size": 96,
            "embedding_size": VOCABULARY,
        },
        "phi4mm": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "qwen3_5_moe_text": _QWEN3_5_MOE,
        "qwen3_5_text": _QWEN3_5,
        "xing4_0": LATENT,
        "z1t": {"aft_heads": 4, "aft_ksize": 4, "dyt_alpha": 0.5},
    },
)

_VISION: dict[str, Configuration] = table(
    {},
    {
        "aya_vision": {"num_hidden_layers": 3, "sliding_window_pattern": 2, "logit_scale": 0.25},
        "cohere_compass": {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "swa_rope_theta": 1000.0,
            "logit_scale": 0.25,
        },
        "deepseek_vl_v2": EXPERTS | LATENT | {"topk_method": "greedy", "scoring_func": "softmax"},
        "deepseekocr": EXPERTS
        | {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 0,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "attn_type": "LlamaAttention",
        },
        "ernie4_5_moe_vl": {
            "moe_num_experts": [4, 4],
            "moe_intermediate_size": [32, 32],
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "mrope_section": [3, 3, 2],
        },
        "falcon_ocr": {},
        "falcon_perception": {},
        "fastvlm": {},
        "gemma3n": {"rope_theta": 10000.0}
        | wrappers.WRAPPERS["gemma3n"]["text_config"]
        | {
            "intermediate_size": [96] * 6,
        },
        "glm4v": {"partial_rotary_factor": 0.5, "rope_scaling": _PARTIAL_SECTIONS},
        "glm4v_moe": EXPERTS | {"partial_rotary_factor": 0.5, "rope_scaling": _PARTIAL_SECTIONS},
        "glm5_next": EXPERTS
        | LATENT
        | _INDEX
        | {
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, "deepseek_sparse_attention", "deepseek_sparse_attention"],
            "indexer_types": ["full", "full", "shared"],
            "qk_rope_head_dim": 0,
            "linear_attn_config": {"head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4},
            "index_kpool": 4,
            "n_group": 1,
        },
        "glm_ocr": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 1.0}},
        "granite4_vision": {
            "logits_scaling": 2.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "shared_intermediate_size": 96,
        },
        "granite_vision": {},
        "hunyuan_vl": {"rope_scaling": {"type": "xdrope", "alpha": 1000.0, "xdrope_section": [2, 2, 2, 2]}},
        "idefics2": {},
        "idefics3": {},
        "inkling": EXPERTS
        | {
            "num_hidden_layers": 3,
            "layer_types": ["hybrid_sliding", FULL, "hybrid_sliding"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": WINDOW,
            "dense_intermediate_size": 96,
            "d_rel": 8,
            "rel_extent": 16,
        },
        "internvl_chat": {},
        "jina_vlm": {"additional_vocab_size": 8},
        "llava": _LLAMA,
        "llava:qwen2": _QWEN2,
        "llava_bunny": {},
        "llava_next": _LLAMA,
        "llava_onevision": {},
        "llmjpvl": _LLAMA,
        "llmjpvl:qwen3": dense.FULL_ATTENTION["qwen3"],
        "locateanything": {},
        "mimo_v2": experts.WINDOWED["mimo_v2_flash"],
        "minicpmv4_6": _QWEN3_5,
        "minicpmv4_7": _QWEN3_5,
        "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "molmo": {
            "d_model": 64,
            "n_heads": 4,
            "n_kv_heads": 2,
            "n_layers": 2,
            "mlp_hidden_size": 192,
            "embedding_size": VOCABULARY,
            "additional_vocab_size": 8,
        },
        "molmo2": {"additional_vocab_size": 8},
        "molmo_point": {"additional_vocab_size": 8},
        "moondream2": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
        "moondream3": EXPERTS | {"num_key_value_heads": 4, "rope_dim": 8, "moe_start_layer": 1},
        "multi_modality": _LLAMA,
        "muse_glimmer": dense.WINDOWED["muse_glimmer"],
        "nemotron_h_nano_omni": recurrent.HYBRID["nemotron_h"],
        "paddleocr_vl": {"rope_scaling": _SECTIONS},
        "paligemma": dense.FULL_ATTENTION["gemma"],
        "paligemma:gemma2": dense.FULL_ATTENTION["gemma2"]
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "phi4_siglip": {"partial_rotary_factor": 0.5},
        "plamo2vl": recurrent.HYBRID["plamo2"],
        "qwen2_5_vl": {"rope_scaling": _SECTIONS},
        "qwen2_vl": {"rope_scaling": _SECTIONS},
        "qwen3_5": _QWEN3_5,
        "qwen3_5_moe": _QWEN3_5_MOE,
        "qwen3_omni_moe": EXPERTS | {"rope_scaling": _SECTIONS},
        "qwen3_vl": {"rope_scaling": _SECTIONS},
        "qwen3_vl_moe": EXPERTS | {"rope_scaling": _SECTIONS},
        "qwen4_exp": _QWEN3_5_MOE
        | {
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, "qwen_sparse_attention", LINEAR],
            "hc_count": 2,
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "ple_embed_dim": 32,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "eos_token_id": 1,
        },
        "step3p7": experts.WINDOWED["step3p5"],
        "unlimited_ocr": EXPERTS
        | {
            "num_key_value_heads": 4,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "sliding_window_size": WINDOW,
        },
        "youtu_vl": LATENT,
        "zaya1_vl": {
            "num_hidden_layers": 4,
            "ffn_hidden_size": 96,
            "num_experts": 4,
            "num_query_groups": 2,
            "zaya_mlp_expansion": 16,
        },
    },
)

VLM_CONFIGURATIONS: dict[str, Configuration] = (
    _FROM_MLX_LM | _TEXT | {name: around(text, model_type=module_of(name)) for name, text in _VISION.items()}
)
"""By "module" or "module:variant"."""

VLM_NOT_BUILT: dict[str, str] = {
    "bitnet": "its linear layers are Metal kernels without a substitute",
    "diffusion_gemma": "denoises blocks of tokens: it is not autoregressive",
    "florence2": "an encoder and a decoder: each call needs the encoder's outputs",
    "llada2_moe": "denoises blocks of tokens: it is not autoregressive",
    "muse_spark": "normalizes, rotates and gates in Metal kernels without a substitute",
    "nemotron_parse": "an encoder and a decoder: each call needs the encoder's outputs",
    "phi3_v": "its class `LanguageModel` is empty: the whole model is the language model",
    "phi3small": "writes to the logits of tokens up to 100351: a smaller vocabulary corrupts the heap",
    "rfdetr": "its class `LanguageModel` is empty: it detects objects",
    "rt_detr_v2": "its class `LanguageModel` is empty: it detects objects",
    "sam3d_body": "its class `LanguageModel` is empty: it estimates bodies",
}

VLM_STAY_NARROW = {"afm7", "phixtral", "plamo2vl"}
"""Their heads are of a fixed size, or follow from others of the entries that `widened` changes."""

# Where mlx-vlm contradicts itself.
VLM_DIFFERS_IN_BLOCKS: dict[str, str] = {
    "deepseek_v4": "the first window that a call compresses does not overlap the window before it",
    "falcon_perception": "without a mask, which its `Model` makes, all tokens of a block see each other",
    "gemma3n": "layers that share K and V rotate their queries by the length after the block",
    "mllama": "without a picture, cross-attention divides the queries in two, and takes them for K and V",
    "unlimited_ocr": "the first single token ends the prompt: later ones share a ring of eight cells",
}
