"""The watchdog of a process whose main thread does nothing any more."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

STUCK = """
import threading
from examples.chat.watchdog import Watchdog

def failing():
    print("left")
    raise OSError

watchdog = Watchdog(failing, lambda: print("saved"), lambda: print("quit", flush=True))
print("ready", flush=True)
lock = threading.Lock()
with lock, lock:
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_main_thread_that_waits_for_ever(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.read() == "left\nsaved\nquit\n"
    assert process.wait() == 128 + number


def test_a_pipe_that_is_closed_is_no_end() -> None:
    code = (
        "from examples.chat.watchdog import *; exit_without_terminal(); print('ready', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(input())"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.communicate("one\ntwo\n")[0] == "ready\ntwo\n"
    assert process.returncode == 0
