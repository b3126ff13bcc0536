"""Whole vision models of mlx-vlm with small random vision towers, and pictures for them.

The language model inside is that of the same name in `VLM_CONFIGURATIONS`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tests.plugin.configurations.build import randomize
from tests.plugin.configurations.common import VOCABULARY, Configuration
from tests.plugin.configurations.vlm.tables import VLM_CONFIGURATIONS

IMAGE = VOCABULARY - 1
"""The token that stands for a part of a picture."""
_VIDEO, _START, _END = VOCABULARY - 2, VOCABULARY - 3, VOCABULARY - 4
_TEXT = [7, 31, 5, 80, 12]
_QUESTION = [44, 9, 61, 3, 28, 70, 15, 52, 8, 33]

# A `ModelConfig` takes what it knows of these.
_OUTER: Configuration = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": _VIDEO,
    "video_token_index": _VIDEO,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
    "pad_token_id": 0,
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Whole:
    """A vision tower, and a picture as the model's processor would hand it over."""

    vision: Configuration
    pixels: tuple[int, ...]
    """The shape of `pixel_values`."""
    tokens: int
    """How many image tokens stand for a picture."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments, as lists of numbers."""
    text: Configuration = field(default_factory=dict)
    """What differs in the text configuration."""
    is_first: bool = False
    """Whether the picture comes before all text."""
    needs_mask: bool = False
    """Whether `get_input_embeddings` needs a mask of the tokens that are no padding."""


_TOWER: Configuration = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 64,
}
# Four rows of six patches, of which two by two become one token.
_PATCHES: Configuration = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "mlp_ratio": 2.0,
    "num_position_embeddings": 64,
}
_QWEN: dict[str, Any] = {"pixels": (24, 3 * 2 * 4 * 4), "tokens": 6, "more": {"image_grid_thw": [[1, 4, 6]]}}

VLM_WHOLE: dict[str, Whole] = {
    "gemma3": Whole(
        _TOWER | {"model_type": "gemma3"},
        (1, 3, 16, 16),
        tokens=4,
        text={"mm_tokens_per_image": 4},
        needs_mask=True,
    ),
    "gemma4": Whole(
        _TOWER | {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
        (1, 3, 16, 24),
        tokens=6,
    ),
    "idefics3": Whole(_TOWER | {"model_type": "idefics3"}, (1, 1, 3, 16, 16), tokens=4),
    "llava": Whole(_TOWER | {"model_type": "clip_vision_model"}, (1, 3, 16, 16), tokens=16),
    # Pictures come by cross-attention, whose keys no cache keeps: each later call of the language model
    # needs the `cross_attention_states` of the first one's output. The second of two tiles is empty.
    "mllama": Whole(
        _TOWER
        | {
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "max_aspect_ratio_id": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        (1, 1, 2, 3, 16, 16),
        tokens=1,
        more={"aspect_ratio_ids": [[1]], "aspect_ratio_mask": [[[1, 0]]]},
    ),
    "paligemma": Whole(
        _TOWER,
        (1, 3, 16, 16),
        tokens=16,
        text={"num_image_tokens": 16, "use_bidirectional_attention": True},
        is_first=True,
        needs_mask=True,
    ),
    "pixtral": Whole(
        _TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 32},
        (1, 3, 16, 24),
        tokens=24,
        more={"image_sizes": [[16, 24]]},
    ),
    "qwen2_5_vl": Whole(_PATCHES | {"window_size": 16, "fullatt_block_indexes": [1]}, **_QWEN),
    "qwen2_vl": Whole(_PATCHES | {"embed_dim": 32, "hidden_size": 64}, **_QWEN),
    "qwen3_5": Whole(_PATCHES, **_QWEN),
    "qwen3_vl": Whole(_PATCHES | {"deepstack_visual_indexes": [0]}, **_QWEN),
}


def build_vlm(name: str, seed: int = 0) -> nn.Module:
    """mlx-vlm's `Model` with random float32 weights, in evaluation mode."""
    mx.random.seed(seed)
    package = f"mlx_vlm.models.{name}"
    whole = VLM_WHOLE[name]
    config = importlib.import_module(f"{package}.config")
    text = copy.deepcopy(VLM_CONFIGURATIONS[name]["text_config"]) | whole.text
    known = inspect.signature(config.ModelConfig).parameters
    outer = {key: value for key, value in _OUTER.items() if key in known}
    model: nn.Module = importlib.import_module(f"{package}.{name}").Model(
        config.ModelConfig(
            text_config=config.TextConfig.from_dict(text),
            vision_config=config.VisionConfig.from_dict(whole.vision),
            model_type=name,
            **outer,
        )
    )
    randomize(model, seed)
    model.eval()
    return model


def picture(name: str, seed: int = 0) -> dict[str, Any]:
    """A prompt with a picture drawn from the seed: the arguments of `Model` and `get_input_embeddings`.

    They are `input_ids`, `pixel_values`, `mask` (None for most) and others by name. The tokens do not
    depend on the seed: there is text, the picture and a longer text.
    """
    whole = VLM_WHOLE[name]
    before = [] if whole.is_first else [*_TEXT, _START]
    tokens = [*before, *[IMAGE] * whole.tokens, _END, *_QUESTION]
    input_ids = mx.array([tokens])
    return {
        "input_ids": input_ids,
        "pixel_values": mx.random.normal(whole.pixels, key=mx.random.key(seed)),
        "mask": mx.ones_like(input_ids) if whole.needs_mask else None,
        **{key: mx.array(value) for key, value in whole.more.items()},
    }
