"""Measures the response times of the chat in examples/."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator

from textual import events

from benchmarks.rows import Row
from benchmarks.setting import Setting
from examples.chat.settings import Settings
from examples.chat.ui.app import Chat

ROWS, COLUMNS = 36, 120
QUESTION = "word " * 200 + "Tell me about the moon."


def run(setting: Setting) -> Iterator[Row]:
    """Seconds from starting the chat to its prompt and first token, and from a key to its letter."""
    prompt, token = _started()
    yield Row("chat.prompt", "from starting the chat to its prompt", "s", prompt)
    yield Row(
        "chat.token",
        "from there, with a message typed at once, to the first token of a reply",
        "s",
        token - prompt,
    )
    yield Row("chat.started", "from starting the chat to the first token", "s", token)
    waits = asyncio.run(_typed(setting.of(48, 12)))
    work = f"from a key to its letter while SmolLM2 reads and replies, the worst of {len(waits)}"
    yield Row("chat.key", work, "ms", max(waits) * 1e3)


def _started() -> tuple[float, float]:
    """Seconds from the start to the prompt, and to the first token of a reply, in a new terminal."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.chat", "--data", folder, "--max-tokens", "1"]
        start = time.perf_counter()
        child, terminal = pty.fork()
        if child == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, command)  # noqa: S606
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        _read_until(terminal, b"Say something")
        prompt = time.perf_counter() - start
        os.write(terminal, b"Say hi.\r")
        # The statistics appear when the reply ends, which is after one token.
        _read_until(terminal, b"wrote")
        token = time.perf_counter() - start
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    return prompt, token


def _read_until(terminal: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        seen = seen[-len(text) :] + os.read(terminal, 65536)


async def _typed(tokens: int) -> list[float]:
    """Seconds from each key to its letter while a reply is generated."""
    app = Chat(None, None, "Be brief.", lambda usual: Settings(temperature=0.0, max_tokens=tokens))
    waits = []
    async with app.run_test(size=(COLUMNS, ROWS)) as pilot:
        while app.worker.ident is None or app.desk.seen is None:
            await pilot.pause()
        app.desk.ask(QUESTION)
        composer = app.query_one("#composer")
        while app.desk.pending:
            before, start = composer.text, time.perf_counter()  # type: ignore[attr-defined]
            app.post_message(events.Key("x", "x"))
            while composer.text == before:  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - start)
            await asyncio.sleep(0.02)
    return waits
