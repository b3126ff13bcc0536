"""Small random models of mlx-vlm: a folder of a text model, and models that see pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models import gemma3, lfm2, qwen2_vl

from tests.folders import written
from tests.plugin.configurations.build import randomize

VOCABULARY = 49152
PICTURE = 49151
"""The placeholder of a picture."""
EACH = 4
"""The placeholders of each picture."""
END = 2
"""SmolLM2's token at the end of a message."""


def text_folder(folder: Path, tokenizer: Any) -> Path:
    """A folder of a Llama, with what mlx-vlm asks for and mlx-lm does not."""
    written(folder, tokenizer, layers=2)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", f'{{"eos_token_id": {END}, ', 1))
    return folder


def tiny_gemma3() -> nn.Module:
    """Sliding windows of 16 tokens, and pictures of 8 by 8 pixels."""
    mx.random.seed(7)
    text = gemma3.TextConfig(
        model_type="gemma3",
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        sliding_window=16,
        sliding_window_pattern=3,
        mm_tokens_per_image=EACH,
    )
    vision = gemma3.VisionConfig(
        model_type="gemma3",
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        patch_size=4,
        image_size=8,
    )
    config = gemma3.ModelConfig(
        text, vision, "gemma3", image_token_index=PICTURE, hidden_size=32, eos_token_id=[END]
    )
    return _random(gemma3.Model(config))


def tiny_qwen2_vl() -> nn.Module:
    """Positions in three dimensions, and pictures of 16 patches."""
    mx.random.seed(7)
    text = qwen2_vl.TextConfig(
        model_type="qwen2_vl",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        vocab_size=VOCABULARY,
        rope_scaling={"type": "mrope", "mrope_section": [4, 2, 2]},
    )
    vision = qwen2_vl.VisionConfig(
        depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, temporal_patch_size=1
    )
    config = qwen2_vl.ModelConfig(
        text, vision, "qwen2_vl", image_token_id=PICTURE, video_token_id=PICTURE - 1,
        vision_start_token_id=PICTURE - 2, vocab_size=VOCABULARY, eos_token_id=[END],
    )  # fmt: skip
    return _random(qwen2_vl.Model(config))


def tiny_lfm2() -> nn.Module:
    """Recurrent layers around full attention, for text only."""
    mx.random.seed(7)
    config = lfm2.ModelConfig(
        model_type="lfm2",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_ff_dim=64,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
        rope_theta=10000.0,
    )
    return _random(lfm2.Model(config))


def pictures_of(model: nn.Module, *seeds: int) -> dict[str, mx.array]:
    """The inputs of a model for random pictures, one for each seed."""
    if not seeds:
        return {}
    keys = map(mx.random.key, seeds)
    if isinstance(model, gemma3.Model):
        return {"pixel_values": mx.stack([mx.random.normal((3, 8, 8), key=key) for key in keys])}
    patches = [mx.random.normal((4 * EACH, 3 * 4 * 4), key=key) for key in keys]
    return {
        "pixel_values": mx.concatenate(patches),
        "image_grid_thw": mx.array([[1, 4, 4]] * len(seeds)),
    }


def prompt(*parts: int) -> list[int]:
    """Tokens: a positive number stands for as many of text, and -1 for a picture."""
    tokens: list[int] = []
    for part in parts:
        if part < 0:
            tokens += [PICTURE - 2] + [PICTURE] * EACH
        else:
            tokens += [(7 * i + 3 * i * i + 11) % 900 + 5 for i in range(len(tokens), len(tokens) + part)]
    return tokens


def _random(model: nn.Module) -> nn.Module:
    randomize(model, 0)
    model.eval()
    return model
