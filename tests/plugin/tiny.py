"""Small random models of mlx-lm's own architectures."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import deepseek_v3, gpt2, llama

VOCABULARY = 97


def randomized(model: nn.Module, dtype: mx.Dtype = mx.float32, seed: int = 0) -> nn.Module:
    """All weights random, norms too: norms of one would hide faults."""
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))

    def draw(path: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape, key=next(keys)) * 0.2
        return (noise + (1.0 if array.ndim == 1 else 0.0)).astype(dtype)

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def tiny_llama(dtype: mx.Dtype = mx.float32, **changes: object) -> nn.Module:
    arguments: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
    }
    return randomized(llama.Model(llama.ModelArgs.from_dict(arguments | changes)), dtype)


def tiny_gpt2(n_positions: int = 64, n_embd: int = 16, vocab_size: int = VOCABULARY) -> nn.Module:
    arguments = gpt2.ModelArgs(
        model_type="gpt2",
        n_ctx=n_positions,
        n_embd=n_embd,
        n_head=2,
        n_layer=2,
        n_positions=n_positions,
        layer_norm_epsilon=1e-5,
        vocab_size=vocab_size,
    )
    return randomized(gpt2.Model(arguments))


def tiny_deepseek_v3(num_hidden_layers: int = 2) -> nn.Module:
    arguments = deepseek_v3.ModelArgs(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        rope_scaling=None,
    )
    return randomized(deepseek_v3.Model(arguments))
