"""Provides text without a download, and a model's loss on it."""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
from collections.abc import Iterator
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


def foretold(
    model: Any, cache: Any, text: list[int], block: int, name: str = ""
) -> Iterator[tuple[int, mx.array]]:
    """Read a text in blocks, except its last token.

    Yields:
        For each block the index of its first token, and the log probabilities (n, vocabulary) of the tokens
        that follow its tokens.
    """
    for start in tqdm(range(0, len(text) - 1, block), desc=name, unit="block", leave=False):
        read = text[start : min(start + block, len(text) - 1)]
        yield start, log_probabilities(model(mx.array([read]), cache=cache)[0])


def log_probabilities(logits: mx.array) -> mx.array:
    """Log probabilities (n, vocabulary) in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def losses(model: Any, cache: Any, text: list[int], block: int, name: str = "") -> np.ndarray:
    """The loss in nats of each token of a text except the first; the text is read in blocks."""
    return np.concatenate(
        [losses_of(logs, text[start:]) for start, logs in foretold(model, cache, text, block, name)]
    )


def losses_and_divergences(
    model: Any, cache: Any, text: list[int], block: int, expected: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """The losses, and how far each prediction is from the expected one: KL divergence in nats.

    Args:
        expected: log probabilities (len(text) - 1, vocabulary), as `foretold` yields them.
    """
    found, apart = [], []
    for start, logs in foretold(model, cache, text, block):
        apart.append(divergences(expected[start : start + len(logs)], logs))
        found.append(losses_of(logs, text[start:]))
    return np.concatenate(found), np.concatenate(apart)


def divergences(expected: mx.array, logs: mx.array) -> np.ndarray:
    """KL divergences of predictions from expected ones in nats, by log probabilities (n, vocabulary)."""
    return np.array((mx.exp(expected) * (expected - logs)).sum(axis=-1))


def losses_of(logs: mx.array, text: list[int]) -> np.ndarray:
    """The losses of the tokens that follow the first n ones, by log probabilities (n, vocabulary)."""
    chosen = mx.take_along_axis(logs, mx.array(text[1 : len(logs) + 1])[:, None], axis=1)[:, 0]
    return -np.array(chosen)
