"""The chat ends when its terminal does or a signal says so, in whatever it is doing, and loses nothing."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.chat.library import Library
from mlx_kvcache.persist import container

from .running import notices, running
from .terminals import ENDS, ChatProcess

Start = Callable[..., ChatProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ChatProcess] = []

    def start(way: str, *options: str) -> ChatProcess:
        options = ("--data", str(tmp_path / "data"), *options)
        started.append(ChatProcess(*options, hangs_up=way != "vanish"))
        return started[-1]

    yield start
    for each in started:
        each.close()


def saved(folder: Path) -> list[dict[str, Any]]:
    """The messages of the one conversation that there is."""
    [file] = (folder / "data" / "conversations").iterdir()
    messages: list[dict[str, Any]] = json.loads(file.read_text())["messages"]
    return messages


async def assert_goes_on(folder: Path, model: Path) -> None:
    """Another chat opens the folder, and has the conversation and its caches."""
    async with running(folder / "data", model) as pilot:
        assert [message.text for message in pilot.app.desk.current.path] == [m["text"] for m in saved(folder)]
        assert notices(pilot) == ""


def replying(chat: ChatProcess, text: str = "Hello there") -> None:
    """Say something, and wait until a reply is being written."""
    chat.until("Say something")
    chat.type(f"{text}\r")
    # Something is cached when the first token has been written.
    chat.until(r"[1-9]\d* of 4,096 tokens")


@pytest.mark.parametrize("way", ["hang-up", "vanish", "SIGTERM"])
async def test_while_a_reply_is_written(way: str, start: Start, tiny: Path, tmp_path: Path) -> None:
    chat = start(way, "--model", str(tiny), "--max-tokens", "1000000")
    replying(chat)
    chat.until_bytes(5000)
    chat.end(way)
    asked, replied = saved(tmp_path)
    assert asked["text"] == "Hello there"
    assert replied["text"]
    assert replied["ended"] == "stopped"
    await assert_goes_on(tmp_path, tiny)


@pytest.mark.parametrize("way", ["vanish", "SIGTERM"])
def test_while_the_model_loads(way: str, start: Start, tmp_path: Path) -> None:
    chat = start(way)
    chat.until("Loading SmolLM2")
    chat.type("Hello there\r")
    chat.until(r"stop \(esc\)")
    chat.end(way)
    assert saved(tmp_path)[0]["text"] == "Hello there"


async def test_while_a_message_is_typed(start: Start, tiny: Path, tmp_path: Path) -> None:
    chat = start("vanish", "--model", str(tiny), "--max-tokens", "4")
    replying(chat, "Hello")
    chat.until("wrote 4 at")
    chat.type("\x05")
    chat.until("Editing message 1")
    chat.type(" to you")
    chat.until("to you")
    chat.end("vanish")
    async with running(tmp_path / "data", tiny) as pilot:
        assert pilot.app.composer.text == "Hello to you"
        assert pilot.app.editing is pilot.app.desk.current.path[0]


def test_in_a_dialog(start: Start, tiny: Path, tmp_path: Path) -> None:
    chat = start("SIGTERM", "--model", str(tiny), "--max-tokens", "1000000")
    replying(chat)
    chat.until_bytes(5000)
    chat.type("\x1bOS")
    chat.until("Capacity: most tokens kept of a chat")
    chat.end("SIGTERM")
    assert saved(tmp_path)[1]["ended"] == "stopped"
    # The terminal is as it was: not the alternate screen, cursor visible.
    assert chat.output.rindex(b"\x1b[?1049l") > chat.output.rindex(b"\x1b[?1049h")
    assert chat.output.rindex(b"\x1b[?25h") > chat.output.rindex(b"\x1b[?25l")


@pytest.mark.parametrize("way", ["vanish", "SIGHUP"])
def test_plain_while_the_model_loads(way: str, start: Start) -> None:
    chat = start(way, "--plain")
    chat.until("Loading SmolLM2")
    chat.end(way)


@pytest.mark.parametrize("way", ["hang-up", "SIGTERM"])
def test_plain_while_a_reply_is_written(way: str, start: Start, tiny: Path) -> None:
    chat = start(way, "--plain", "--model", str(tiny), "--max-tokens", "1000000")
    chat.until("/help for commands", "> ")
    chat.type("Hello\r")
    chat.until_bytes(1000)
    chat.end(way)


def test_plain_at_its_prompt(start: Start, tiny: Path) -> None:
    chat = start("hang-up", "--plain", "--model", str(tiny))
    chat.until("/help for commands", "> ")
    chat.end("hang-up")


def test_a_script(start: Start, tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.txt"
    script.write_text("Hello\nHello again\n")
    chat = start("vanish", "--script", str(script), "--model", str(tiny), "--max-tokens", "1000000")
    chat.until("> Hello")
    chat.until_bytes(1000)
    chat.end("vanish")


RUNS = int(os.environ.get("CHAT_HANGUPS", "2"))
MOST_BYTES = 100_000 if RUNS > 2 else 30_000
"""How much more may be printed of a reply."""
STAGES = ["leaving", "start", "loading", "replying", "typing"]


@pytest.mark.parametrize("seed", range(RUNS))
def test_at_any_moment(seed: int, start: Start, tokenizer: Any, tmp_path: Path) -> None:
    """With the real model, from the first byte on the screen to the middle of a reply and of leaving."""
    rng = random.Random(seed)
    way, stage = rng.choice(ENDS), STAGES[seed % len(STAGES)]
    chat = start(way, "--max-tokens", "1000000")
    text, draft = "Count from one to a thousand, in words.", "and this"
    if stage == "loading":
        chat.until("Say something")
        chat.type(f"{text}\r")
        chat.until(r"stop \(esc\)")
    elif stage != "start":
        replying(chat, text)
    if stage == "typing":
        chat.type(draft)
        chat.until(draft)
    # Without a message the screen comes to rest after about 20,000 bytes.
    chat.until_bytes(rng.randrange(1, 20_000 if stage == "start" else MOST_BYTES))
    told = max((int(n.replace(",", "")) for n in re.findall(r"wrote ([\d,]+) at", chat.text)), default=0)
    if stage == "leaving":
        chat.type("\x11")
    seconds = chat.end(way)
    asked, *replied = saved(tmp_path) if stage != "start" else ({},)
    written = sum(len(tokenizer.encode(each["text"])) for each in replied)
    sys.stdout.write(f"{stage:9} {way:8} {seconds:5.2f} s, {told:4} tokens shown, {written:4} saved\n")
    library = Library(tmp_path / "data")
    library.load()
    _, other = library.load_state()
    assert library.problems == []
    for path in (tmp_path / "data" / "caches").glob("**/*.safetensors"):
        # The checksums of all arrays are compared.
        assert list(container.read_arrays(container.read_contents(path)))
    assert asked.get("text", text) == text
    assert all(each["text"] and each["ended"] == "stopped" for each in replied)
    # The newest tokens may have been counted before their text was told.
    assert written >= told - 4
    assert other.get("draft", "") == (draft if stage == "typing" else "")
