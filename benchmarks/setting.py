"""Defines the options of a benchmark run: the model, and full or quick runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models import llama

from examples import smollm2

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
"""SmolLM2's shape."""


@dataclass(frozen=True)
class Setting:
    """The options of a run.

    Args:
        model: "tiny", "large", "smollm2" or a folder with a model, for benchmarks that run a model; None
            takes each benchmark's default.
        is_quick: whether to make fewer and smaller runs.
    """

    model: str | None = None
    is_quick: bool = False

    def load(self, usual: str) -> tuple[Any, Any]:
        """Load the chosen model, by default `usual`, and its tokenizer; None if it has no tokenizer.

        Raises:
            ValueError: there is no such model.
        """
        name = self.model or usual
        if name == "tiny":
            return two_layers(), None
        if name == "large":
            return sixteen_layers(), None
        if name == "smollm2":
            return smollm2.load(mx.float32)
        if not Path(name).is_dir():
            raise ValueError(f"no model {name}: expected tiny, large, smollm2 or a folder")
        model, tokenizer, *_ = mlx_lm.load(name)
        return model, tokenizer

    def of(self, usual: Any, quick: Any) -> Any:
        """Return `quick` in a quick run and `usual` otherwise."""
        return quick if self.is_quick else usual


@cache
def sixteen_layers() -> Any:
    """Make a model of a billion parameters, as Llama 3.2 has, in bfloat16 with random weights."""
    mx.random.seed(0)
    shape = llama.ModelArgs(
        model_type="llama",
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=32000,
        rope_theta=500000.0,
    )
    model = llama.Model(shape)
    model.set_dtype(mx.bfloat16)
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    return model


def two_layers() -> Any:
    """Make a model of two layers of SmolLM2's shape, with a small vocabulary and random weights."""
    mx.random.seed(0)
    shape = llama.ModelArgs(
        model_type="llama",
        hidden_size=HEADS * DIM,
        num_hidden_layers=2,
        intermediate_size=1536,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        rms_norm_eps=1e-5,
        vocab_size=512,
        rope_theta=100000.0,
        rope_traditional=True,
    )
    model = llama.Model(shape)
    mx.eval(model.parameters())
    return model
