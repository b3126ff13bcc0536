"""A pytest plugin: every name of a model on the hub stands for the folder in PEERS_MODEL."""

from __future__ import annotations

import os
from typing import Any

import huggingface_hub
import transformers

MODEL = os.environ["PEERS_MODEL"]


def _snapshot_download(*arguments: Any, **options: Any) -> str:
    return MODEL


# Before a module of mlx-lm or a test binds the name.
huggingface_hub.snapshot_download = _snapshot_download
_from_pretrained = transformers.AutoTokenizer.from_pretrained


def _tokenizer(name: Any, *arguments: Any, **options: Any) -> Any:
    is_folder = os.path.isdir(name)  # noqa: PTH112  # a str or a Path
    return _from_pretrained(name if is_folder else MODEL, *arguments, **options)


transformers.AutoTokenizer.from_pretrained = _tokenizer
