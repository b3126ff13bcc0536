"""Patches mlx-vlm's server, so that a request that does not fit the capacity fails alone, with status 400.

mlx-vlm's server generates for all clients in one thread. An exception in it ends all requests in progress,
so prompts are checked when they are inserted (see `mlx_vlm_batch.insert`), and before a stream begins.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_vlm.generate.diffusion import is_diffusion_model
from mlx_vlm.server.generation import PromptTooLongError, ResponseGenerator, _count_prompt_tokens

from ...errors import CacheFullError
from ..forward.batch_rows import Rows
from .mlx_vlm_batch import empty_rows
from .mlx_vlm_media import flat, forget, note

original_initialize = ResponseGenerator._initialize_model
original_preprocess = ResponseGenerator._preprocess_request
original_generate = ResponseGenerator.generate
original_validate = ResponseGenerator.validate_context_budget


def initialize_model(self: Any) -> None:
    """Replaces `ResponseGenerator._initialize_model`: also tries the model out, in the thread that runs it.

    Raises NotSupportedError if the model does not run on these caches.
    """
    original_initialize(self)
    _empty_rows(self.model)


def preprocess_request(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Replaces `ResponseGenerator._preprocess_request`: also records the pictures of the request."""
    inputs: dict[str, Any] = original_preprocess(self, *args, **kwargs)
    tokens = inputs.get("input_ids")
    if isinstance(tokens, mx.array) and tokens.size == tokens.shape[-1]:
        note(self.model, flat(tokens), inputs, {})
    else:
        forget()
    return inputs


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `ResponseGenerator.generate`: a prompt that does not fit is the client's error."""
    try:
        return original_generate(self, *args, **kwargs)
    except CacheFullError as error:
        raise PromptTooLongError(str(error)) from error


def validate_context_budget(
    self: Any, prompt: str, images: Any = None, audio: Any = None, args: Any = None, videos: Any = None
) -> None:
    """Replaces `ResponseGenerator.validate_context_budget`, which knows only the server's own limit."""
    original_validate(self, prompt, images, audio, args, videos)
    self.wait_until_ready()
    rows = _empty_rows(self.model)
    if rows is not None and rows.conversation.limits.capacity is not None:
        more = args.preprocessing_kwargs() if args else {}
        inputs = self._preprocess_request(prompt, images, audio, videos, **more)
        try:
            rows.conversation.reply_room(_count_prompt_tokens(inputs))
        except CacheFullError as error:
            raise PromptTooLongError(str(error)) from error


def _empty_rows(model: Any) -> Rows | None:
    """The rows of an empty cache of an attached model; None for others."""
    # Diffusion models generate in another way.
    return None if is_diffusion_model(model) else empty_rows(getattr(model, "language_model", None))
