"""mlx-vlm's server in this process, with every model attached, and clients of it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvicorn
from mlx_vlm import server as mlx_vlm_server

from mlx_kvcache.plugin.attach import _all_models, _bind_all, attach_all
from mlx_kvcache.plugin.hosts.mlx_vlm import MLX_VLM
from tests.plugin.serving.clients import Client


class VisionClient(Client):
    """Sends chats to a server of one model."""

    def __init__(self, port: int, model: Path) -> None:
        super().__init__(port)
        self.model = str(model)

    def ask(self, text: str, **more: object) -> Any:
        """The answer to the first turn of a chat."""
        return self.chat(text, model=self.model, **more)

    def stream(self, text: str, **more: object) -> str:
        """The reply to the first turn of a chat, as a stream."""
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": 6}
        with self.open("/v1/chat/completions", body | {"stream": True} | more) as response:
            lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        deltas = (choice["delta"] for chunk in chunks for choice in chunk["choices"])
        return "".join(delta["content"] or "" for delta in deltas)

    def statistics(self) -> dict[str, Any]:
        """What the prefix cache counts."""
        import urllib.request

        with urllib.request.urlopen(f"{self._url}/v1/cache/stats", timeout=300) as response:
            counts: dict[str, Any] = json.load(response)
            return counts


@contextmanager
def served(model: Path, *arguments: object, apc: bool = False, **options: Any) -> Iterator[VisionClient]:
    """A server of a model folder.

    Args:
        arguments: of mlx-vlm's command.
        apc: whether its prefix cache is on.
        options: of `attach_all`.
    """
    command = ["mlx_vlm.server", "--model", str(model), "--log-level", "ERROR", *map(str, arguments)]
    environment = {"APC_ENABLED": str(int(apc)), "APC_DISK_ENABLED": "0"}
    attach_all(MLX_VLM, **options)
    with patch.dict(os.environ, environment), socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        # Clients that connect before the model is loaded wait.
        listening.listen()
        with patch.object(sys, "argv", command), patch.object(uvicorn, "run"):
            mlx_vlm_server.main()
        server = uvicorn.Server(uvicorn.Config(mlx_vlm_server.app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield VisionClient(listening.getsockname()[1], model)
        finally:
            server.should_exit = True
            thread.join()
            # Ends the thread that generates, which the server leaves to the end of the process.
            mlx_vlm_server.unload_model_sync()
            _all_models.pop()
            _bind_all()
