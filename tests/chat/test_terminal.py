"""The whole of it as a user meets it: in a real terminal, with the real model."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TMUX = shutil.which("tmux")

DONE = r"(?s)\A(?!.*stop \(esc\))"
"""A screen without a reply in progress."""

pytestmark = pytest.mark.skipif(TMUX is None, reason="needs tmux")


class Terminal:
    """A window of tmux, on a server of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.socket = str(folder / name)
        command = (
            f"{sys.executable} -m examples.chat --data {folder / 'data'} --temperature 0 --max-tokens 12"
        )
        command += "; echo ended with $?; cat"
        self("new-session", "-d", "-x", "100", "-y", "30", "-c", str(ROOT), command)
        # What the chat writes also comes here, so that nobody has to look at a screen that stays the same.
        output = folder / f"{name}.output"
        os.mkfifo(output)
        self("pipe-pane", f"exec cat > {output}")
        self._output = os.open(output, os.O_RDONLY)

    def __call__(self, *arguments: str) -> str:
        run = [str(TMUX), "-S", self.socket, "-f", "/dev/null", *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout

    def keys(self, *keys: str) -> None:
        self("send-keys", *keys)

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def until(self, *texts: str) -> str:
        """Wait until all of these patterns are on the screen."""
        while True:
            screen = self.screen()
            if all(re.search(text, screen) for text in texts):
                return screen
            assert "ended with" not in screen or "ended with 0" in texts, screen
            assert select.select([self._output], [], [], 120)[0], f"{texts} not on\n{screen}"
            os.read(self._output, 1 << 16)

    def close(self) -> None:
        os.close(self._output)
        subprocess.run([str(TMUX), "-S", self.socket, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[[], Terminal]]:
    opened: list[Terminal] = []

    def open_() -> Terminal:
        opened.append(Terminal(tmp_path, f"tmux-{len(opened)}"))
        return opened[-1]

    yield open_
    for terminal in opened:
        terminal.close()


def test_a_conversation_edited_branched_and_there_again(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    terminal.until("Say something", r"\^e Edit", "Nothing yet")
    terminal.keys("What is the capital of France?", "Enter")
    terminal.until("Paris", "reused 0 of 28 tokens", DONE)
    terminal.keys("C-e")
    terminal.until("Editing message 1")
    terminal.keys(*["BSpace"] * len("France?"), "Italy?", "Enter")
    terminal.until("Rome", "version 2 of 2", "used by", DONE)
    terminal.keys("M-Left")
    terminal.until("Paris", "version 1 of 2")
    terminal.keys("C-q")
    terminal.until("ended with 0")
    again = open_terminal()
    again.until("Paris", "version 1 of 2")
    again.keys("And of Japan?", "Enter")
    screen = again.until("Tokyo", r"reused [1-9]\d* of", DONE)
    reused, read = map(int, re.findall(r"reused (\d+) of (\d+) tokens", screen)[-1])
    assert reused >= 35 > 16 >= read - reused
    again.keys("C-c")
    again.until("ended with 0")
