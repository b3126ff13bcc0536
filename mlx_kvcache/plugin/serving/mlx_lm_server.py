"""Patches mlx-lm's tools, so that in its server a request that cannot be served fails alone.

mlx-lm's server generates for all clients in one thread; an exception in it ends the server. The patches
check a request while mlx-lm can still answer it with an error: the model must be supported, and the prompt
and a reply must fit the capacity. An exception during generation ends the requests in progress with an
error, and the thread continues with new requests. What was computed for requests that end early, by an
error or because the client has left, is stored, so that the next try goes on from it.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from queue import Queue
from typing import Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import stream_generate as _original_stream
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.server import APIHandler, ResponseGenerator

from ...errors import CacheError
from ...radix_tree import shared_length
from ..files import save_for_mlx_lm
from ..pool.splice import left_to_compute
from . import mlx_lm_store

_under_way: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Queue[Any]]] = weakref.WeakKeyDictionary()
"""For each server, the queues on which clients wait for their replies."""


_generating = threading.local()
"""In a thread that generates, `server` refers to the server whose request it has tokenized last.

`prompt` has the tokens of this request, if its cache is found by them.
"""

_servers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The server of each batch."""


class EmptyPromptError(ValueError):
    """A request's prompt has no tokens."""


class InterruptedReplyError(RuntimeError):
    """An error in the server ended a reply."""


def insert_segments(
    self: Any,
    segments: Sequence[Sequence[Sequence[int]]],
    max_tokens: Sequence[int] | None = None,
    caches: Sequence[Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces `BatchGenerator.insert_segments`: inserts no prompt unless all fit and can form a batch.

    With overflow="error", `max_tokens` is lowered to the room that the prompt leaves.

    Raises:
        CacheFullError: a prompt and one token of its reply exceed the capacity.
        ValueError: a cache belongs to another pool than the others.
    """
    server = getattr(_generating, "server", None)
    if server is not None:
        _servers[self] = server
    caches = list(caches or [None] * len(segments))
    most = list(max_tokens or [self.max_tokens] * len(segments))
    # Otherwise mlx-lm's own function raises an error.
    if len(caches) == len(most) == len(segments):
        running = [*self._prompt_batch.prompt_cache[:1], *self._generation_batch.prompt_cache[:1]]
        in_batch = (running, *(own[3] for own in self._unprocessed_sequences))
        pools = {id(rows.pool) for entries in in_batch for rows in mlx_lm_store.rows_of(entries)}
        for i, prompt in enumerate(segments):
            if caches[i] is None:
                caches[i] = mlx_lm_cache.make_prompt_cache(self.model, self.max_kv_size)
            for rows in mlx_lm_store.rows_of(caches[i]):
                rows.check_called_by(self.model)
                pools.add(id(rows.pool))
                if len(pools) > 1:
                    raise ValueError(
                        "a prompt cache cannot join this batch: its options differ from those of the running "
                        "sequences; make it with the same options, or insert it after these have ended"
                    )
                most[i] = min(most[i], rows.conversation.reply_room(sum(map(len, prompt))))
        segments = [_spliced(prompt, cache) for prompt, cache in zip(segments, caches, strict=True)]
    return _originals["insert_segments"](self, segments, most, caches, *args, **kwargs)


def stream_generate(
    model: Any, tokenizer: Any, prompt: Any, *args: Any, prompt_cache: Any = None, **kwargs: Any
) -> Any:
    """Replaces `stream_generate` of mlx-lm: computes what a splice has left of a prompt.

    For a request that a server answers alone, stores what was computed before an error.
    """
    if prompt_cache is None or isinstance(prompt, str):
        return _original_stream(model, tokenizer, prompt, *args, prompt_cache=prompt_cache, **kwargs)
    text = getattr(_generating, "prompt", [])
    is_served = bool(text) and text[-len(prompt) :] == list(prompt)
    pieces = _spliced([prompt], prompt_cache)
    rest = pieces[0] if len(pieces) == 1 else [token for piece in pieces for token in piece]
    stream = _original_stream(model, tokenizer, rest, *args, prompt_cache=prompt_cache, **kwargs)
    return _stored_on_error(stream, text, prompt_cache) if is_served else stream


def _stored_on_error(stream: Iterator[Any], prompt: Sequence[int], cache: Any) -> Iterator[Any]:
    """Yield from the stream of a reply. After an error, store what was computed."""
    tokens = list(prompt)
    try:
        for response in stream:
            tokens.append(response.token)
            yield response
    except Exception:
        server = getattr(_generating, "server", lambda: None)()
        # The other ranks may have had no error, and would not take part.
        if server is not None and not server._is_distributed:
            _store(server, tokens, cache)
        raise


def _store(server: Any, tokens: Sequence[int], cache: Any) -> None:
    """Store what a server has computed of a request that ended early."""
    try:
        mlx_lm_store.insert_partial(server.prompt_cache, server.model_provider.model_key, tokens, cache)
    except Exception:
        # The caches may be in any state after an error. The other requests go on.
        logging.exception("a request that has ended early is not stored")


def _spliced(segments: Sequence[Any], cache: Sequence[Any]) -> Sequence[Any]:
    """The pieces of a prompt that a splice leaves to compute, or the prompt if there is no splice.

    mlx-lm's server takes as many tokens from the prompt's end.
    """
    pieces = [piece for rows in mlx_lm_store.rows_of(cache) for piece in left_to_compute(rows.conversation)]
    return pieces if sum(map(len, pieces)) == sum(map(len, segments)) else segments


def remove(self: Any, uids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Replaces `BatchGenerator.remove`: stores what was computed for clients of a server that have left."""
    _store_partial(self, uids)
    return _originals["remove"](self, uids, *args, **kwargs)


def _store_partial(batch: Any, uids: Iterable[int]) -> None:
    """Store what a server's batch has computed for some of its requests."""
    server = _servers.get(batch, lambda: None)()
    if server is None:
        return
    # The others have computed nothing yet.
    running = {*batch._prompt_batch.uids, *batch._generation_batch.uids}
    for uid in sorted(running.intersection(uids)):
        try:
            [(cache, tokens)] = batch.extract_cache([uid]).values()
        except Exception:
            # The batch may be in any state after an error. The other requests go on.
            logging.exception("a request that has ended early is not stored")
        else:
            _store(server, tokens, cache)


def tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
    """Replaces `ResponseGenerator._tokenize`: also checks the request; the client gets the error.

    If the prompt's text is stored in other tokens, such as those that were generated, takes these.
    """
    _generating.server = weakref.ref(self)
    result = _retokenized(self, tokenizer, _originals["_tokenize"](self, tokenizer, request, args))
    _generating.prompt = [] if _has_pictures(result) else result[0]
    prompt = len(result[0])
    if not prompt:
        raise EmptyPromptError("the prompt is empty: at least 1 token is needed")
    provider = self.model_provider
    models = [model for model in (provider.model, provider.draft_model) if model is not None]
    mlx_lm_store.note_models(self.prompt_cache, models)
    ahead = args.num_draft_tokens + 1 if len(models) > 1 else 0
    for model in models:
        for rows in mlx_lm_store.rows_of(mlx_lm_cache.make_prompt_cache(model)):
            args.max_tokens = min(args.max_tokens, rows.conversation.reply_room(prompt, ahead))
            rows.conversation.close()
    return result


def _retokenized(server: Any, tokenizer: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The result of `_tokenize` with stored tokens of the same text; see `SessionPool.retokenize`.

    It begins with the prompt, and the segments into which the prompt is divided.
    """
    prompt, segments, *rest = result
    if _has_pictures(result):
        return result
    tokens = mlx_lm_store.retokenized(server.prompt_cache, server.model_provider.model_key, prompt, tokenizer)
    begin = shared_length(tokens, prompt)
    end = shared_length(tokens[:begin:-1], prompt[:begin:-1])
    borders = list(accumulate(map(len, segments[:-1])))
    if tokens == prompt or any(begin < border < len(prompt) - end for border in borders):
        return result
    more = len(tokens) - len(prompt)
    edges = [0, *(border + more * (border > begin) for border in borders), len(tokens)]
    return (tokens, [tokens[a:b] for a, b in pairwise(edges)], *rest)


def _has_pictures(result: tuple[Any, ...]) -> bool:
    """Whether a cache is found by other tokens than those that `_tokenize` has returned."""
    return any(hasattr(vision, "cache_key") for vision in result[2:])


def share_request(self: Any, request: Any) -> Any:
    """Replaces `ResponseGenerator._share_request`: also records the client's queue."""
    shared = _originals["_share_request"](self, request)
    if shared is not None:
        _under_way.setdefault(self, weakref.WeakSet()).add(shared[0])
    return shared


def generate(self: Any) -> None:
    """Replaces `ResponseGenerator._generate`: continues with new requests after an exception."""
    while True:
        try:
            _originals["_generate"](self)
            return
        except Exception as error:
            waiting = list(_under_way.pop(self, ()))
            if not waiting:
                # Not caused by a request; for example, the model cannot be loaded.
                raise
            logging.exception("ending %s requests in progress", len(waiting))
            # The other ranks may have had no error, and would not take part.
            own = () if self._is_distributed else [b for b, server in _servers.items() if server() is self]
            for batch in own:
                _store_partial(batch, [*batch._prompt_batch.uids, *batch._generation_batch.uids])
                _servers.pop(batch)
            reason = f"{type(error).__name__}: {error}"
        for queue in waiting:
            # A new exception, because the original one refers to the thread's frames with caches and models.
            queue.put(InterruptedReplyError(f"the reply was interrupted by {reason}; send the request again"))


def set_completion_headers(self: Any, status_code: int = 200) -> None:
    """Replaces `APIHandler._set_completion_headers`: mlx-lm sends 404 for errors of all kinds."""
    if status_code == 404:
        status_code = _status(sys.exc_info()[1])
    _originals["_set_completion_headers"](self, status_code)


def handle_completion(self: Any, request: Any, stop_words: list[str]) -> None:
    """Replaces `APIHandler.handle_completion`: sends the client the error that ended its reply."""
    try:
        _originals["handle_completion"](self, request, stop_words)
    except ConnectionError:
        raise
    except Exception as error:
        logging.exception("a reply ended with an error")
        body = json.dumps({"error": str(error)}).encode()
        if self.stream:
            self.wfile.write(b"data: " + body + b"\n\n")
            return
        # Discards the headers of the reply, which have not been sent yet.
        self._headers_buffer = []
        _originals["_set_completion_headers"](self, _status(error, otherwise=500))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _status(error: BaseException | None, otherwise: int = 404) -> int:
    """The HTTP status for an error: 400 for the request's fault, 500 for the server's, or `otherwise`."""
    if isinstance(error, InterruptedReplyError):
        return 500
    return 400 if isinstance(error, (CacheError, EmptyPromptError)) else otherwise


def save_prompt_cache(file_name: str, cache: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Replaces `save_prompt_cache` of mlx-lm, which would write quantized windows as if they were floats."""
    if mlx_lm_store.is_ours(cache):
        path = Path(file_name)
        # MLX adds this suffix to a name that has none.
        save_for_mlx_lm(path if path.suffix else path.with_suffix(".safetensors"), cache, metadata)
    else:
        _original_save(file_name, cache, metadata or {})


_original_save = mlx_lm_cache.save_prompt_cache
FUNCTIONS = {
    "save_prompt_cache": (_original_save, save_prompt_cache),
    "stream_generate": (_original_stream, stream_generate),
}
"""Functions of mlx-lm that modules import by name, each with its replacement."""

_PATCHES: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (mlx_lm_cache.LRUPromptCache, "fetch_nearest_cache", mlx_lm_store.fetch_nearest_cache),
    (mlx_lm_cache.LRUPromptCache, "insert_cache", mlx_lm_store.insert_cache),
    (BatchGenerator, "insert_segments", insert_segments),
    (BatchGenerator, "remove", remove),
    (ResponseGenerator, "_tokenize", tokenize),
    (ResponseGenerator, "_share_request", share_request),
    (ResponseGenerator, "_generate", generate),
    (APIHandler, "_set_completion_headers", set_completion_headers),
    (APIHandler, "handle_completion", handle_completion),
)
_originals: dict[str, Callable[..., Any]] = {name: getattr(cls, name) for cls, name, _ in _PATCHES}


def patch(is_attached: bool) -> None:
    """Replace mlx-lm's functions while a model is attached, and restore its own otherwise."""
    for cls, name, function in _PATCHES:
        setattr(cls, name, function if is_attached else _originals[name])
