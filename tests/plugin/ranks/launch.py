"""Starting ranks on this machine, as `mlx.launch --backend ring` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 240
"""Seconds after which ranks are taken to hang."""


def launch(
    size: int, folder: Path, *arguments: str, module: str = "tests.plugin.ranks.worker"
) -> list[subprocess.CompletedProcess[str]]:
    """Run a module as so many ranks. Raises TimeoutExpired where they hang; none is left running."""
    with _addresses(size) as addresses:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[address] for address in addresses]), encoding="utf-8")
        # One rank alone is no ring, and `mlx.launch` gives it no hosts.
        ring = {"MLX_HOSTFILE": str(hosts)} if size > 1 else {}
        command = [sys.executable, "-m", module, str(folder), *arguments]
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | ring | {"MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            return [
                subprocess.CompletedProcess(command, process.wait(), output)
                for process in processes
                for output in [process.communicate(timeout=TIMEOUT)[0]]
            ]
        finally:
            for process in processes:
                process.kill()
                process.wait()


@contextmanager
def _addresses(size: int) -> Iterator[list[str]]:
    """Addresses with free ports. Sockets that only hold them let the ring bind them too, and nobody else."""
    sockets = [socket.socket() for _ in range(size)]
    try:
        for holder in sockets:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(("127.0.0.1", 0))
        yield [f"127.0.0.1:{holder.getsockname()[1]}" for holder in sockets]
    finally:
        for holder in sockets:
            holder.close()
