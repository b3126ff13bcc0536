"""Small models with SmolLM2's tokenizer, as folders that are loaded as a user's would be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from examples import smollm2

    meta: Any
    _, meta = mx.load(str(smollm2.find()), return_metadata=True)
    return smollm2._tokenizer(meta)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Two layers."""
    return _written(tmp_path_factory.mktemp("models") / "tiny", tokenizer, layers=2)


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """One layer: keys and values depend on nothing but token and position, whatever was forgotten."""
    return _written(tmp_path_factory.mktemp("models") / "flat", tokenizer, layers=1)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Heads of 48 features, which groups of 64 do not divide."""
    return _written(tmp_path_factory.mktemp("models") / "odd", tokenizer, layers=1, head_dim=48)


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> tuple[nn.Module, Any]:
    from examples.chat.models import load

    return load(str(tiny))


@pytest.fixture(scope="session")
def flat_model(flat: Path) -> tuple[nn.Module, Any]:
    from examples.chat.models import load

    return load(str(flat))


def _written(folder: Path, tokenizer: Any, layers: int, head_dim: int = 64) -> Path:
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
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(asdict(arguments), folder / "config.json")
    tokenizer.save_pretrained(folder)
    return folder
