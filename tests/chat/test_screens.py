"""Pictures of the main screens, compared with those of before: `pytest --snapshot-update` takes new ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from .running import chat, idle, ready, say


async def talk(pilot: Any) -> None:
    await ready(pilot)
    pilot.app.query_one("#composer").cursor_blink = False
    await say(pilot, "Hello there")
    await say(pilot, "And again")
    await pilot.press("ctrl+e", "!", "enter")
    await idle(pilot)


async def at_rest(pilot: Any) -> None:
    """Wait until the screen stays as it is."""
    pictures = [str(number) for number in range(5)]
    while len(set(pictures[-5:])) > 1:
        await pilot.pause()
        pictures.append(pilot.app.export_screenshot())


def pressed(*keys: str) -> Callable[[Any], Awaitable[None]]:
    async def run(pilot: Any) -> None:
        await talk(pilot)
        await pilot.press(*keys)
        await idle(pilot)
        for screen in pilot.app.screen_stack:
            for field in screen.query("Input, TextArea"):
                field.cursor_blink = False
        await at_rest(pilot)

    return run


SCREENS = {
    "main": ((120, 36), pressed()),
    "small": ((80, 24), pressed()),
    "tiny": ((20, 16), pressed()),
    "light": ((100, 30), pressed("f6")),
    "branches": ((100, 30), pressed("ctrl+b")),
    "settings": ((100, 30), pressed("f4")),
    "keys": ((100, 40), pressed("f1")),
}


@pytest.mark.parametrize("name", SCREENS)
def test_screen(name: str, tiny: Path, tmp_path: Path, snap_compare: Any) -> None:
    size, run = SCREENS[name]
    assert snap_compare(chat(None, tiny), terminal_size=size, run_before=run)
