"""A pytest plugin: every name of a model on the hub stands for the folder in PEERS_MODEL.

Each test begins with the same random numbers, so that those without a seed do the same in both runs.
"""

from __future__ import annotations

import os
import random
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import transformers

MODEL = os.environ["PEERS_MODEL"]


def _snapshot_download(*arguments: Any, **options: Any) -> str:
    return MODEL


# Before a module of mlx-lm or a test binds the name.
huggingface_hub.snapshot_download = _snapshot_download  # type: ignore[assignment]
_from_pretrained = transformers.AutoTokenizer.from_pretrained


def _tokenizer(name: Any, *arguments: Any, **options: Any) -> Any:
    is_folder = os.path.isdir(name)  # noqa: PTH112  # a str or a Path
    return _from_pretrained(name if is_folder else MODEL, *arguments, **options)


transformers.AutoTokenizer.from_pretrained = _tokenizer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # what the tests of mlx-lm use
    mx.random.seed(0)
