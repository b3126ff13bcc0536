"""Pictures of the chat, taken in a real conversation with SmolLM2: python -m docs.screenshots"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from textual.pilot import Pilot
from tqdm import tqdm

from examples.chat.settings import Settings
from tests.chat.running import Observed, idle, ready, say

HERE = Path(__file__).parent / "pictures"
SYSTEM = "You are a helpful AI assistant."
SIZE = (120, 36)


async def conversation(pilot: Pilot[None]) -> None:
    """A message edited, a reply made again, and another conversation."""
    await say(pilot, "What is the capital of France?")
    await say(pilot, "What is the capital of Italy?")
    await pilot.press("ctrl+e", *("backspace",) * len("Italy?"), *"Japan?", "enter")
    await idle(pilot)
    await say(pilot, "Write two sentences about it.")
    await pilot.press("ctrl+r")
    await idle(pilot)
    await pilot.press("ctrl+n")
    await idle(pilot)
    await say(pilot, "What do bees make?")
    await pilot.press("ctrl+o", "enter", "down", "enter")
    await idle(pilot)


async def overflow(pilot: Pilot[None]) -> None:
    """More turns than there is room for."""
    for question in ("Name a fruit.", "Name a color.", "Name a city.", "Name a river.", "Name a mountain."):
        await say(pilot, question)


async def branches(pilot: Pilot[None]) -> None:
    await conversation(pilot)
    await pilot.press("ctrl+b")
    await pilot.pause()


async def settings(pilot: Pilot[None]) -> None:
    await say(pilot, "What is the capital of France?")
    await pilot.press("f4")
    await pilot.pause()


async def later(pilot: Pilot[None]) -> None:
    """The next start, at which nothing is asked yet."""
    await pilot.pause()


async def light(pilot: Pilot[None]) -> None:
    await pilot.press("f6")
    await conversation(pilot)


PICTURES = {
    "chat": (conversation, Settings(temperature=0.0, max_tokens=48)),
    "chat-disk": (later, Settings(temperature=0.0, max_tokens=48)),
    "chat-light": (light, Settings(temperature=0.0, max_tokens=48)),
    "chat-overflow": (overflow, Settings(temperature=0.0, max_tokens=32, capacity=128)),
    "chat-window": (overflow, Settings(temperature=0.0, max_tokens=32, window=48)),
    "chat-branches": (branches, Settings(temperature=0.0, max_tokens=48)),
    "chat-settings": (settings, Settings(temperature=0.0, max_tokens=16)),
}


async def take(name: str, folder: Path) -> None:
    script, chosen = PICTURES[name]
    with TemporaryDirectory() as data:
        if script is later:
            await picture_of(conversation, chosen, Path(data))
        picture = await picture_of(script, chosen, Path(data))
    (folder / f"{name}.svg").write_text(picture, "utf-8")


async def picture_of(script: Callable[[Any], Awaitable[None]], chosen: Settings, data: Path) -> str:
    """Play a script in a new process of the chat, as it were, on a folder of data."""
    app = Observed(data, None, SYSTEM, lambda usual: chosen)
    async with app.run_test(size=SIZE) as pilot:
        await ready(pilot)
        await script(pilot)
        picture = app.export_screenshot(title="python -m examples.chat", simplify=True)
        app.desk.close()
        await asyncio.to_thread(app.worker.join)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.screenshots", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of {', '.join(PICTURES)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: %(default)s)")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))}")
    mx.set_default_device(mx.cpu)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in tqdm(chosen.names or list(PICTURES)):
        asyncio.run(take(name, chosen.out))


if __name__ == "__main__":
    main()
