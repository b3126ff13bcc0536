"""Models as folders, as mlx-lm loads them: random, with a real tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model


def written(folder: Path, tokenizer: Any, layers: int, head_dim: int = 64) -> Path:
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        vocab_size=49152,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    mx.random.seed(7)
    return saved(folder, llama.Model(arguments), asdict(arguments), tokenizer)


def saved(folder: Path, model: nn.Module, configuration: dict[str, Any], tokenizer: Any) -> Path:
    """Write a model as a folder."""
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(configuration, folder / "config.json")
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def tokenizers_read_once() -> Iterator[None]:
    """Inside, mlx-lm reads the tokenizer of each folder once: all else about a small model is quicker."""
    read, known = utils.load_tokenizer, dict[str, Any]()

    def load_tokenizer(folder: Path, *args: Any, **kwargs: Any) -> Any:
        key = repr((folder, args, kwargs))
        if key not in known:
            known[key] = read(folder, *args, **kwargs)
        return known[key]

    with patch.object(utils, "load_tokenizer", load_tokenizer):
        yield
