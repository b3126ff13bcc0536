"""Keys by which conversations with pictures are found: their tokens, with a number for each picture.

mlx-vlm's prompts have the same placeholder token for every picture, so their tokens alone do not tell which
keys and values belong to them. In a key, each placeholder is replaced by a number made from the content of
the picture at its place. Two requests then share what comes before the first picture that differs, and
nothing after it. What cannot be hashed is never shared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_vlm import apc
from mlx_vlm.generate import ar, dispatch

from ..forward.batch_rows import Rows
from ..hosts.observe import is_cache

Span = tuple[int, int]

original_prepare = dispatch._prepare_generation_inputs
original_step = ar.generate_step
original_hash = apc.semantic_extra_hash

_FIRST = 1 << 62
"""Numbers of pictures are above it, and tokens below. Files hold numbers from 0 to (1 << 63) - 1."""
_PICTURES = ("pixel", "image", "video")
"""How the names of inputs that hold pictures and videos begin."""
_OPTIONS = ("kv_", "quantized_kv_start")
"""How the names of options for a cache begin."""


class Request(NamedTuple):
    """What decides a request's keys and values: its tokens, and the media among its inputs.

    Attributes:
        tokens: the tokens of the prompt.
        key: the tokens with pictures' numbers; only those before the first picture that cannot be hashed.
        salt: a hash of the media that have no place among the tokens, such as audio.
        pictures: the ranges of tokens that are placeholders.
        options: its options for quantization.
    """

    tokens: tuple[int, ...]
    key: tuple[int, ...]
    salt: int
    pictures: tuple[Span, ...]
    options: Mapping[str, Any]

    def keys(self, tokens: Sequence[int]) -> list[int] | None:
        """The key of the prompt and a reply to it, or of a part of it; None if it has other tokens."""
        n = len(self.tokens)
        if tuple(tokens[:n]) != self.tokens[: len(tokens)]:
            return None
        more = list(tokens[n:]) if len(self.key) == n else []
        return list(self.key[: len(tokens)]) + more

    def is_text(self, position: int) -> bool:
        """Whether no picture follows a position."""
        return all(end <= position for _, end in self.pictures)

    def before(self, position: int) -> int:
        """The newest position <= `position` that is not inside a picture."""
        return next((first for first, end in self.pictures if first < position < end), position)


class Salt(int):
    """mlx-vlm's hash of a request's media, with what is needed to share the text before them.

    Attributes:
        text: the hash without pictures and videos.
        request: the request.
    """

    text: int
    request: Request

    def __new__(cls, total: int, text: int, request: Request) -> Salt:
        made = super().__new__(cls, total)
        made.text, made.request = text, request
        return made


_now = threading.local()
_under_way: weakref.WeakKeyDictionary[Rows, Request] = weakref.WeakKeyDictionary()
"""The requests that caches were last used for."""


def placeholders(model: Any) -> set[int]:
    """The tokens that stand for pictures and videos in the prompts of a model."""
    found: set[int] = apc.multimodal_token_ids_from_config(getattr(model, "config", None))
    return found


def note(model: Any, tokens: Sequence[int], inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Record the request whose inputs this thread has just prepared.

    Args:
        inputs: the inputs of the model by name.
        options: the options of generation; those of its cache are recorded.
    """
    # Others hold arrays and caches.
    kept = {name: value for name, value in options.items() if name.startswith(_OPTIONS)}
    _now.request = request_of(tokens, inputs, placeholders(model), kept)


def forget() -> None:
    """The next request of this thread prepares its inputs in another way."""
    _now.request = None


def noted(tokens: Sequence[int]) -> Request | None:
    """The request whose inputs this thread has prepared last, if it has these tokens."""
    request: Request | None = getattr(_now, "request", None)
    return request if request and request.tokens == tuple(tokens) else None


def answered(rows: Rows) -> Request | None:
    """The request that mlx-vlm has last generated for with a cache."""
    return _under_way.get(rows)


def request_of(
    tokens: Sequence[int],
    inputs: Mapping[str, Any],
    marks: Collection[int],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Request:
    """Describe a request.

    Args:
        marks: the tokens that are placeholders.
    """
    spans = apc.media_token_spans(tokens, marks)
    media = {name: value for name, value in inputs.items() if _is_media(name, value, len(tokens))}
    pictures = {name: value for name, value in media.items() if name.startswith(_PICTURES)}
    others = media if not spans else {name: media[name] for name in media.keys() - pictures.keys()}
    # Some processors mark pictures by negative tokens.
    key = [token if token >= 0 else _FIRST + token for token in tokens]
    if spans and not pictures:
        # Such as a picture in inputs of other names: nothing tells it from others.
        del key[spans[0][0] :]
    else:
        for (first, end), number in zip(spans, _numbers(pictures, spans), strict=True):
            key[first:end] = [_FIRST | number % _FIRST] * (end - first)
    return Request(tuple(tokens), tuple(key), _hash(others), tuple(spans), options)


def _is_media(name: str, value: Any, length: int) -> bool:
    """Whether an input may hold media: of pictures anything, else arrays without a number for each token."""
    if name.startswith(_PICTURES):
        return value is not None
    if name in ("input_ids", "inputs_embeds", "mask", "attention_mask"):
        return False
    if isinstance(value, (list, tuple)):
        return any(_is_media(name, part, length) for part in value)
    if not isinstance(value, (mx.array, np.ndarray)):
        return False
    is_by_token = tuple(value.shape) in ((length,), (1, length)) and "float" not in str(value.dtype)
    return name not in ar._SEQUENCE_ALIGNED_PROMPT_KWARGS and not is_by_token


def _numbers(pictures: Mapping[str, Any], spans: Sequence[Span]) -> list[int]:
    """A number for each range of placeholders: a hash of its picture, or of all of them.

    All of them count where it is not certain which rows of the inputs belong to which range.
    """
    count, pixels, grid = len(spans), pictures.get("pixel_values"), pictures.get("image_grid_thw")
    if not isinstance(pixels, mx.array):
        return [_hash(pictures)] * count
    if len(pictures) == 1 and pixels.ndim == 4 and pixels.shape[0] == count:
        return [_hash({"pixels": row}) for row in pixels]
    if len(pictures) == 2 and grid is not None and len(grid) == count:
        sizes = np.array(grid).tolist()
        edges = [0, *accumulate(map(prod, sizes))]
        if edges[-1] == pixels.shape[0]:
            parts = [pixels[begin:end] for begin, end in pairwise(edges)]
            return [_hash({"pixels": p, "grid": str(g)}) for p, g in zip(parts, sizes, strict=True)]
    return [_hash(pictures)] * count


def _hash(media: Mapping[str, Any]) -> int:
    found: int = original_hash(media=media) if media else 0
    return found


def prepare_generation_inputs(
    model: Any, processor: Any, prompt: Any, image: Any, audio: Any, video: Any, kwargs: dict[str, Any]
) -> Any:
    """Replaces `_prepare_generation_inputs`: also records the request."""
    prepared = original_prepare(model, processor, prompt, image, audio, video, kwargs)
    tokens, pixels, _, others = prepared
    if isinstance(tokens, mx.array) and tokens.size == tokens.shape[-1]:
        note(model, flat(tokens), {**others, "pixel_values": pixels}, kwargs)
    else:
        forget()
    return prepared


def semantic_extra_hash(**kwargs: Any) -> int:
    """Replaces `semantic_extra_hash`: the hash also knows the request whose inputs were just prepared."""
    total: int = original_hash(**kwargs)
    request: Request | None = getattr(_now, "request", None)
    if request is None:
        return total
    media = {name: value for name, value in (kwargs.get("media") or {}).items() if name != "video"}
    if not request.pictures:
        return Salt(total, total, request)
    return Salt(total, original_hash(**(kwargs | {"image_hash": 0, "media": media})), request)


def generate_step(input_ids: mx.array, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `generate_step`: also records which cache the request under way is generated with."""
    cache: Any = kwargs.get("prompt_cache")
    request: Request | None = getattr(_now, "request", None)
    if is_cache(cache):
        tokens = tuple(flat(input_ids))
        if request and request.tokens[-len(tokens) :] == tokens:
            _under_way[cache[0].rows] = request
        else:
            _under_way.pop(cache[0].rows, None)
    forget()
    return original_step(input_ids, model, *args, **kwargs)


def flat(tokens: mx.array) -> list[int]:
    """The tokens of a prompt (1, n) as a list."""
    listed: Any = tokens.flatten().tolist()
    return list(listed)
