"""mlx-lm's server in this process, with every model attached, and clients of it."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from mlx_lm import server as mlx_lm_server
from mlx_lm.models.cache import LRUPromptCache

from mlx_kvcache.plugin.attach import _all_models, _bind_all, attach_all


class Answer(NamedTuple):
    """What a client gets: the HTTP status, and the JSON."""

    status: int
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The reply to a completion."""
        text: str = self.body["choices"][0]["text"]
        return text

    @property
    def finish(self) -> str:
        finish: str = self.body["choices"][0]["finish_reason"]
        return finish


class Client:
    """Sends requests to a server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def complete(self, prompt: str, **more: object) -> Answer:
        """A completion, greedy, of 6 tokens unless told otherwise."""
        return self._ask("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0.0} | more)

    def chat(self, text: str, **more: object) -> Answer:
        """The first turn of a conversation."""
        return self.converse([{"role": "user", "content": text}], **more)

    def converse(self, messages: list[dict[str, str]], **more: object) -> Answer:
        """The next turn of a conversation."""
        body = {"messages": messages, "max_tokens": 6, "temperature": 0.0}
        return self._ask("/v1/chat/completions", body | more)

    def health(self) -> int:
        """The HTTP status of /health."""
        with urllib.request.urlopen(f"{self._url}/health", timeout=300) as response:
            status: int = response.status
            return status

    def open(self, path: str, body: dict[str, object]) -> Any:
        """The response to a POST, to be read."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=300)

    def _ask(self, path: str, body: dict[str, object]) -> Answer:
        try:
            with self.open(path, body) as response:
                return Answer(response.status, json.load(response))
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.load(error))


@contextmanager
def served(model: Path, *arguments: object, is_attached: bool = True, **options: Any) -> Iterator[Client]:
    """A server of a model folder.

    Args:
        arguments: of mlx-lm's command.
        options: of `attach_all`.
    """
    providers: list[Any] = []
    command = ["mlx_lm.server", "--model", str(model), *map(str, arguments)]
    with (
        patch.object(sys, "argv", command),
        patch.object(mlx_lm_server, "run", lambda host, port, provider: providers.append(provider)),
    ):
        mlx_lm_server.main()
    with attached(options) if is_attached else nothing():
        size = providers[0].cli_args.prompt_cache_size
        generator = mlx_lm_server.ResponseGenerator(providers[0], LRUPromptCache(size))

        def handler(*given: Any) -> Any:
            return mlx_lm_server.APIHandler(generator, *given, system_fingerprint="test")

        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        # At the end it waits for the next look at whether to end.
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(http.server_port)
        finally:
            http.shutdown()
            thread.join()
            http.server_close()
            generator.stop_and_join()


@contextmanager
def attached(options: dict[str, Any]) -> Iterator[None]:
    """Every model is attached inside."""
    attach_all(**options)
    try:
        yield
    finally:
        _all_models.pop()
        _bind_all()


@contextmanager
def nothing() -> Iterator[None]:
    yield
