"""mlx-lm's server and batches on these caches: a request that cannot be served fails alone.

mlx-lm's server generates for all clients in one thread, and an exception there ends it for all. So
what can be known of a request is checked where mlx-lm answers it with an error: whether the model
runs on these caches, and whether the prompt and a reply fit the capacity. What is raised later all
the same ends the requests under way with an error, and the thread goes on with the next ones.
"""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.server import APIHandler, ResponseGenerator

from ...errors import CacheError, CacheFullError
from ..forward.rows import Rows
from . import prompt_store

_under_way: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Queue[Any]]] = weakref.WeakKeyDictionary()
"""For each server: the queues by which its clients wait for what is generated."""


class EmptyPromptError(ValueError):
    """A request has no tokens to begin with."""


class InterruptedReplyError(RuntimeError):
    """The server could not go on with a reply."""


def insert_segments(
    self: Any,
    segments: Sequence[Sequence[Sequence[int]]],
    max_tokens: Sequence[int] | None = None,
    caches: Sequence[Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for `BatchGenerator.insert_segments`: takes in what can be generated to its end.

    With `overflow="error"` a reply ends at the capacity, as at `max_tokens`.

    Raises:
        CacheFullError: a prompt, and one token of a reply, exceed the capacity; nothing is inserted.
        ValueError: a cache cannot join the others; nothing is inserted.
    """
    caches = list(caches or [None] * len(segments))
    most = list(max_tokens or [self.max_tokens] * len(segments))
    if not len(caches) == len(most) == len(segments):
        # mlx-lm says what is wrong.
        return _originals["insert_segments"](self, segments, most, caches, *args, **kwargs)
    running = [*self._prompt_batch.prompt_cache[:1], *self._generation_batch.prompt_cache[:1]]
    pools = [
        rows.pool
        for entries in (running, *(own[3] for own in self._unprocessed_sequences))
        for rows in prompt_store.rows_of(entries)
    ]
    for i, prompt in enumerate(segments):
        if caches[i] is None:
            caches[i] = mlx_lm_cache.make_prompt_cache(self.model, self.max_kv_size)
        for rows in prompt_store.rows_of(caches[i]):
            rows.check_called_by(self.model)
            if any(pool is not rows.pool for pool in pools):
                raise ValueError(
                    "a prompt cache cannot join this batch: it was made with other options than those of "
                    "the running sequences; make it with the same options, or let these end first"
                )
            pools.append(rows.pool)
            most[i] = min(most[i], _room(rows, sum(map(len, prompt))))
    return _originals["insert_segments"](self, segments, most, caches, *args, **kwargs)


def _room(rows: Rows, prompt: int, ahead: int = 0) -> int:
    """How many tokens a reply to so many may have. Raises CacheFullError where it is none.

    Args:
        ahead: tokens that are tried beyond the reply's, such as a draft model's.
    """
    capacity, overflow, _, _ = rows.conversation.limits
    if capacity is None or overflow != "error":
        return sys.maxsize
    room = capacity - rows.positions[0] - prompt - ahead
    if room < 1:
        raise CacheFullError(
            prompt + ahead + 1,
            capacity - rows.positions[0],
            capacity,
            f"the prompt has {rows.positions[0] + prompt} tokens and needs room for a reply; shorten it, "
            'raise the capacity, or use overflow="shift"',
        )
    return room


def tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
    """Stands in for `ResponseGenerator._tokenize`, whose errors mlx-lm gives to the client.

    Raises:
        EmptyPromptError: no tokens.
        CacheFullError: a prompt that does not fit the capacity.
        NotSupportedError: a model that does not run on these caches.
    """
    result = _originals["_tokenize"](self, tokenizer, request, args)
    prompt = len(result[0])
    if not prompt:
        raise EmptyPromptError("the prompt is empty: at least 1 token is needed")
    provider = self.model_provider
    models = [model for model in (provider.model, provider.draft_model) if model is not None]
    prompt_store.note_models(self.prompt_cache, models)
    ahead = args.num_draft_tokens + 1 if len(models) > 1 else 0
    for model in models:
        for rows in prompt_store.rows_of(mlx_lm_cache.make_prompt_cache(model)):
            args.max_tokens = min(args.max_tokens, _room(rows, prompt, ahead))
            rows.conversation.close()
    return result


def share_request(self: Any, request: Any) -> Any:
    """Stands in for `ResponseGenerator._share_request`: notes who waits for a reply."""
    shared = _originals["_share_request"](self, request)
    if shared is not None:
        _under_way.setdefault(self, weakref.WeakSet()).add(shared[0])
    return shared


def run_generate(self: Any) -> None:
    """Stands in for `ResponseGenerator._run_generate`: goes on after an exception, with new requests."""
    while True:
        try:
            self._generate()
            return
        except Exception as error:
            waiting = list(_under_way.pop(self, ()))
            if not waiting:
                # No request did that: the model cannot be loaded, for instance.
                logging.exception("mlx_lm.server cannot generate")
                self._generation_failed = True
                return
            logging.exception("%s requests under way are ended", len(waiting))
            reason = f"{type(error).__name__}: {error}"
        for queue in waiting:
            # A new exception: the one above holds the thread's frames, and so caches and models.
            queue.put(InterruptedReplyError(f"the reply was interrupted; ask again ({reason})"))


def set_completion_headers(self: Any, status_code: int = 200) -> None:
    """Stands in for `APIHandler._set_completion_headers`: errors in a request are not "not found"."""
    if status_code == 404:
        status_code = _status(sys.exc_info()[1])
    _originals["_set_completion_headers"](self, status_code)


def handle_completion(self: Any, request: Any, stop_words: list[str]) -> None:
    """Stands in for `APIHandler.handle_completion`: a client is told what ended its reply."""
    try:
        _originals["handle_completion"](self, request, stop_words)
    except ConnectionError:
        raise
    except Exception as error:
        logging.exception("a reply is ended")
        body = json.dumps({"error": str(error)}).encode()
        if self.stream:
            self.wfile.write(b"data: " + body + b"\n\n")
            return
        # The headers of a reply have not been sent yet.
        self._headers_buffer = []
        _originals["_set_completion_headers"](self, _status(error, otherwise=500))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _status(error: BaseException | None, otherwise: int = 404) -> int:
    """The HTTP status for an error: the request's fault, the server's, or as mlx-lm has it."""
    if isinstance(error, InterruptedReplyError):
        return 500
    return 400 if isinstance(error, (CacheError, EmptyPromptError)) else otherwise


_PATCHES: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (BatchGenerator, "insert_segments", insert_segments),
    (ResponseGenerator, "_tokenize", tokenize),
    (ResponseGenerator, "_share_request", share_request),
    (ResponseGenerator, "_run_generate", run_generate),
    (APIHandler, "_set_completion_headers", set_completion_headers),
    (APIHandler, "handle_completion", handle_completion),
)
_originals: dict[str, Callable[..., Any]] = {name: getattr(cls, name) for cls, name, _ in _PATCHES}


def patch() -> None:
    """Let mlx-lm's server and batches use what is here."""
    for cls, name, function in _PATCHES:
        setattr(cls, name, function)


def restore() -> None:
    """Give mlx-lm's own functions back."""
    for cls, name, _ in _PATCHES:
        setattr(cls, name, _originals[name])
