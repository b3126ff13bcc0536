"""What tells a model and its tokenizer from others, so that no cache is read by another than its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

SAMPLES = 16
"""Parameters of which some numbers are looked at: to read all of them would take as long as loading."""
NUMBERS = 64


def fingerprint(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Digests of a model's configuration and weights, and of a tokenizer where one is given."""
    found = identity(model) | {"weights": _weights(model)}
    if tokenizer is not None:
        found["tokenizer"] = _digest(_tokenizer(tokenizer))
    return found


def identity(model: nn.Module) -> dict[str, str]:
    """The part of it that is the same for every shard of a model."""
    arguments = getattr(model, "args", None)
    is_plain = is_dataclass(arguments) and not isinstance(arguments, type)
    return {
        "architecture": type(model).__module__,
        "configuration": _digest(_text(asdict(arguments) if is_plain else {})),  # type: ignore[arg-type]
    }


def _weights(model: nn.Module) -> str:
    """Of the parameters' names, shapes and dtypes, and of the first numbers of some."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    outline = [[name, list(array.shape), str(array.dtype)] for name, array in parameters]
    chosen = parameters[:: max(1, len(parameters) // SAMPLES)]
    first = [array.reshape(-1)[:NUMBERS].view(mx.uint8) for _, array in chosen]
    mx.eval(first)
    return _digest(_text(outline) + b"".join(np.array(numbers).tobytes() for numbers in first))


def _tokenizer(tokenizer: Any) -> bytes:
    """What tells which text tokens stand for, and how a conversation is written."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    numbers = np.array([vocabulary[word] for word in words], np.int64)
    template = _text(getattr(tokenizer, "chat_template", None))
    return "\0".join(words).encode("utf-8", "surrogatepass") + numbers.tobytes() + template


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
