"""Identifies a model's weights and tokenizer, so that no cache is used with the wrong ones."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..hosts.layout import configuration_of
from ..hosts.observe import PerModel

NUMBERS = 1024
"""Approximate number of elements sampled per array. Reading all would take as long as loading the model."""

_FORM = "2:"
"""Prefix of digests in the present format. Digests without it are in the format of `first_form`."""


class Version:
    """Identifies the arrays that a model has now. Replacing any of them makes another version.

    An array that is changed in place (`weight += 1`) stays the same array.
    """

    def __init__(self, model: nn.Module, arrays: Sequence[mx.array]) -> None:
        self._model = weakref.ref(model)
        # Weak, to not keep replaced weights alive. A dead reference equals no array.
        self._arrays = dict(enumerate(map(weakref.ref, arrays)))
        self._count = len(arrays)

    def is_of(self, model: nn.Module, arrays: Sequence[mx.array]) -> bool:
        return (
            self._model() is model
            and len(arrays) == self._count
            and all(ref() is arrays[place] for place, ref in self._arrays.items())
        )

    def after_call(self, model: nn.Module) -> None:
        """Ignore arrays that the model's own call has replaced, as gemma3n does, in later comparisons."""
        arrays = _arrays(model)
        own = [i for i, ref in self._arrays.items() if len(arrays) == self._count and ref() is not arrays[i]]
        for place in own:
            del self._arrays[place]
        if own:
            # The replaced arrays were clipped or widened, so the digest is another.
            self.__dict__.pop("digest", None)

    @cached_property
    def digest(self) -> str:
        """Digest of all arrays' names, shapes, dtypes and samples. Ask for it before the model changes."""
        model = self._model()
        assert model is not None
        parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
        samples = (sample(array) for _, array in parameters)
        # NumPy has no bfloat16; the bytes are the same.
        plain = [part.view(mx.uint16) if part.dtype == mx.bfloat16 else part for part in samples]
        return _FORM + _weights(parameters, plain)


_lock = threading.Lock()
_versions: PerModel[list[Version]] = PerModel(list)
"""For each model, a list with its newest version."""
_tokenizers: dict[int, tuple[weakref.ref[Any], Any, str]] = {}


def version_of(model: nn.Module) -> Version:
    """Return the version of a model's weights: the same object until its arrays change. Reads no array."""
    arrays, known = _arrays(model), _versions.of(model)
    with _lock:
        if not known or not known[0].is_of(model, arrays):
            known[:] = [Version(model, arrays)]
        return known[0]


def fingerprint(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Return digests of a model's configuration and weights, and of a tokenizer if one is given."""
    found = identity(model) | {"weights": version_of(model).digest}
    if tokenizer is not None:
        found["tokenizer"] = _tokenizer(tokenizer)
    return found


def identity(model: nn.Module) -> dict[str, str]:
    """Return the part of the fingerprint that is the same for all shards of a model."""
    configuration = _digest(_text(configuration_of(model)))
    return {"architecture": type(model).__module__, "configuration": configuration}


def first_form(model: nn.Module) -> str:
    """Return the digest of weights in the format of the first releases: from 64 elements of some arrays."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    chosen = parameters[:: max(1, len(parameters) // 16)]
    return _weights(parameters, [array.reshape(-1)[:64].view(mx.uint8) for _, array in chosen])


def is_first_form(digest: object) -> bool:
    """Whether a digest of weights from a file is in the format of `first_form`."""
    return isinstance(digest, str) and not digest.startswith(_FORM)


def sample(array: mx.array) -> mx.array:
    """Return about `NUMBERS` elements of an array, at equal distances in every dimension."""
    steps, left = [1] * array.ndim, NUMBERS
    # Short dimensions first: longer ones then make up for the elements those lack.
    for rank, axis in enumerate(sorted(range(array.ndim), key=array.shape.__getitem__)):
        wanted = max(1, round(left ** (1 / (array.ndim - rank))))
        # An odd step does not hit the same place in every group, block or head.
        steps[axis] = max(1, array.shape[axis] // wanted) | 1
        left = max(1, left // max(1, -(-array.shape[axis] // steps[axis])))
    # Slices of an array in memory are views: other elements are neither read nor copied.
    return array[tuple(slice(None, None, step) for step in steps)]


def _weights(parameters: Sequence[tuple[str, mx.array]], samples: list[mx.array]) -> str:
    """Return the digest of the parameters' names, shapes and dtypes, and of samples."""
    outline = [[name, list(array.shape), str(array.dtype)] for name, array in parameters]
    mx.eval(samples)
    return _digest(_text(outline) + b"".join(np.array(part).tobytes() for part in samples))


def _arrays(model: nn.Module) -> list[mx.array]:
    """Return a model's parameters in a fixed order."""
    found, stack = list[mx.array](), list[Any]([model])
    while stack:
        node = stack.pop()
        if isinstance(node, mx.array):
            found.append(node)
        elif isinstance(node, dict):
            # MLX does not count names with an underscore as parameters, such as masks made during a call.
            stack += [value for name, value in node.items() if not str(name).startswith("_")]
        elif isinstance(node, (list, tuple)):
            stack += node
    return found


def _tokenizer(tokenizer: Any) -> str:
    """Return the digest of a tokenizer's vocabulary and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    state = template, len(getattr(tokenizer, "added_tokens_decoder", ()))
    key = id(tokenizer)
    known = _tokenizers.get(key)
    if known and known[0]() is tokenizer and known[1] == state:
        return known[2]
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer must be one returned by mlx_lm.load, got {tokenizer!r:.60}")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    numbers = np.array([vocabulary[word] for word in words], np.int64)
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    digest = _digest(text + numbers.tobytes() + _text(template))
    # A tokenizer without weak references is not cached.
    with suppress(TypeError):
        _tokenizers[key] = weakref.ref(tokenizer, lambda _: _tokenizers.pop(key, None)), state, digest
    return digest


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
