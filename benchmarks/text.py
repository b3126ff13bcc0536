"""Provides text without a download, and a model's loss on it."""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm


def topics(tokenizer: Any, n: int) -> list[int]:
    """The first n tokens of the help texts in Python's standard library."""
    tokens: list[int] = tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values()))
    return tokens[:n]


def code(tokenizer: Any, n: int) -> list[int]:
    """The first n tokens of the source of Python's `argparse`."""
    tokens: list[int] = tokenizer.encode(inspect.getsource(argparse))
    return tokens[:n]


def losses(model: Any, cache: Any, text: list[int], block: int, name: str = "") -> np.ndarray:
    """The loss in nats of each token of a text except the first; the text is read in blocks."""
    found = []
    for start in tqdm(range(0, len(text) - 1, block), desc=name, unit="block", leave=False):
        read, foretold = text[start : start + block], text[start + 1 : start + block + 1]
        logits = model(mx.array([read[: len(foretold)]]), cache=cache)[0].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(foretold)[:, None], axis=1)[:, 0]
        found.append(np.array(mx.logsumexp(logits, axis=-1) - chosen))
    return np.concatenate(found)
