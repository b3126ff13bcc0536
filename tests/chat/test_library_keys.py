"""The application's conversations, settings and ends, by its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input, OptionList, TextArea

from examples.chat.ui.composer import Composer
from examples.chat.ui.transcript import Earlier

from .running import endless, idle, more, notices, running, say, shown, texts, until, write


async def test_new_search_open_rename_delete(tiny: Path, tmp_path: Path) -> None:
    async with running(tmp_path, tiny) as pilot:
        await say(pilot, "apples")
        await pilot.press("ctrl+n")
        await say(pilot, "pears")
        desk = pilot.app.desk
        assert [each.title for each in desk.conversations] == ["pears", "apples"]
        await pilot.press("ctrl+o", *"appl")
        options = pilot.app.query_one("#conversations OptionList", OptionList)
        assert options.option_count == 1
        await pilot.press("enter", "f2")
        await until(pilot, lambda: isinstance(pilot.app.focused, Input))
        pilot.app.focused.value = "fruit"
        await pilot.press("enter")
        assert desk.conversations[1].title == "fruit"
        pilot.app.query_one("#conversations Input", Input).value = "fruit"
        await pilot.pause()
        options.focus()
        await pilot.press("enter")
        await idle(pilot)
        assert texts(pilot) == ["apples"]
        await pilot.press("ctrl+o", "enter", "f8")
        await until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        await pilot.press("y")
        await until(pilot, lambda: len(pilot.app.screen_stack) == 1)
        await pilot.pause()
        assert [each.title for each in desk.conversations] == ["pears"]
        assert texts(pilot) == ["pears"]
        assert len(list((tmp_path / "deleted").iterdir())) == 1


async def set_fields(pilot: Any, **values: str) -> None:
    """Fill in the dialog of settings, and take them over."""
    await pilot.pause()
    for name, value in values.items():
        pilot.app.screen.query_one(f"#{name}", Input).value = value
    await pilot.press("ctrl+s")


async def test_settings(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await pilot.press("f4")
        await set_fields(pilot, capacity="3")
        assert "64 or more, got 3" in str(pilot.app.screen.query_one("#wrong").render())
        await set_fields(pilot, capacity="128", window="32", bits="8", temperature="0.5")
        await idle(pilot)
        settings = pilot.app.desk.settings
        assert (settings.capacity, settings.window, settings.bits, settings.temperature) == (128, 32, 8, 0.5)
        await say(pilot, "Again")
        [holding] = pilot.app.desk.seen.holdings
        assert holding.rule.size == 32
        assert holding.packed


async def test_settings_that_are_no_numbers(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        before = pilot.app.desk.settings
        await pilot.press("f4")
        await set_fields(pilot, window="x")
        assert "must be a number" in str(pilot.app.screen.query_one("#wrong").render())
        await pilot.press("escape")
        assert pilot.app.desk.settings == before


async def test_settings_that_the_model_cannot_have(odd: Path) -> None:
    async with running(None, odd) as pilot:
        before = pilot.app.desk.settings
        await pilot.press("f4")
        await set_fields(pilot, bits="8")
        await idle(pilot)
        assert "48" in notices(pilot)
        assert pilot.app.desk.settings == before
        await say(pilot, "Hello")
        assert len(shown(pilot)) == 2


async def test_system_prompt(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await pilot.press("f3")
        await until(pilot, lambda: pilot.app.screen.query(TextArea))
        pilot.app.screen.query_one(TextArea).text = "Speak like a pirate."
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert pilot.app.desk.current.system == "Speak like a pirate."
        await say(pilot, "Hello again")
        assert pilot.app.desk.current.path[-1].cost.reused < pilot.app.desk.current.path[-1].cost.prefilled


async def test_keys_theme_and_export(tiny: Path, tmp_path: Path) -> None:
    async with running(tmp_path, tiny) as pilot:
        await pilot.press("?")
        await until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        await pilot.press("?")
        await until(pilot, lambda: len(pilot.app.screen_stack) == 1)
        dark = pilot.app.theme
        await pilot.press("f6")
        assert pilot.app.theme != dark
        await say(pilot, "Hello")
        await pilot.press("f9")
        [file] = (tmp_path / "exports").iterdir()
        assert "Hello" in file.read_text()
        await pilot.press("ctrl+y")
        assert pilot.app.clipboard == pilot.app.desk.current.path[-1].text
        await pilot.press("f7")
        assert not pilot.app.query_one("#cache").display


async def test_everything_is_there_at_the_next_start(tiny: Path, tmp_path: Path) -> None:
    async with running(tmp_path, tiny) as pilot:
        await say(pilot, "Hello there")
        await say(pilot, "And again")
        await pilot.press("f6")
        theme, path = pilot.app.theme, pilot.app.desk.current.path
        await pilot.press("ctrl+c")
        await until(pilot, lambda: not pilot.app.is_running)
    async with running(tmp_path, tiny) as pilot:
        assert pilot.app.theme == theme
        assert pilot.app.desk.current.path == path
        assert shown(pilot) == [message.text for message in path]
        assert pilot.app.desk.seen.cached > 0
        await say(pilot, "Go on")
        cost = pilot.app.desk.current.path[-1].cost
        assert cost.prefilled <= 14
        assert cost.reused >= pilot.app.desk.seen.cached - cost.prefilled - cost.generated


async def test_ctrl_c_while_writing_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    async with endless(tmp_path, tiny) as pilot:
        await pilot.press("ctrl+q")
        pilot.app.flow()
        await until(pilot, lambda: not pilot.app.is_running)
    async with running(tmp_path, tiny) as pilot:
        path = pilot.app.desk.current.path
        assert [message.role for message in path] == ["user", "assistant"]
        assert path[1].ended == "stopped"
        assert path[1].text


async def test_leaving_at_once_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    async with endless(tmp_path, tiny) as pilot:
        await more(pilot)
        await pilot.press(*"draft")
        # The model's side does not come to its end, so that everything is saved without it.
        await pilot.press("ctrl+q", "ctrl+q")
        await until(pilot, lambda: not pilot.app.is_running)
        written = pilot.app.desk.current.path[1].text
        assert written
    async with running(tmp_path, tiny) as pilot:
        path = pilot.app.desk.current.path
        assert [(message.text, message.ended) for message in path] == [("Hello", ""), (written, "stopped")]
        assert pilot.app.composer.text == "draft"
        # A reply of which only the text is known can be gone on from.
        await pilot.press("ctrl+k", "ctrl+u")
        await say(pilot, "Go on")
        assert len(pilot.app.desk.current.path) == 4


@pytest.mark.parametrize("size", [(20, 10)])
async def test_sizes_and_resizing_while_a_reply_is_written(tiny: Path, size: tuple[int, int]) -> None:
    async with endless(None, tiny, size=size) as pilot:
        for width in (20, 60, 110, 30, size[0]):
            await pilot.resize_terminal(width, size[1])
            await pilot.pause()
            await more(pilot)
        await pilot.press("escape")
        await idle(pilot)
        assert len(shown(pilot)) == 2
        assert pilot.app.query_one(Composer).size.width > 10


async def test_long_conversations_begin_with_their_end(tiny: Path, tmp_path: Path) -> None:
    async with running(tmp_path, tiny) as pilot:
        desk = pilot.app.desk
        for turn in range(40):
            desk.current.say(f"Question {turn}", desk.current.leaf)
        await pilot.app.show()
        assert len(shown(pilot)) == 30
        assert pilot.app.query(Earlier)
        await pilot.press("ctrl+home")
        await pilot.pause()
        assert len(shown(pilot)) == 40


async def test_a_model_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    async with running(None, tiny) as pilot:
        await pilot.press("f5")
        await until(pilot, lambda: isinstance(pilot.app.focused, Input))
        pilot.app.focused.value = str(tmp_path / "nothing")
        await pilot.press("enter")
        await idle(pilot)
        assert "there is no folder" in notices(pilot)
        assert pilot.app.desk.model == str(tiny)
        await say(pilot, "Hello")
        assert len(shown(pilot)) == 2


async def test_no_model_at_all(tmp_path: Path) -> None:
    async with running(None, tmp_path / "nothing") as pilot:
        await write(pilot, "Hello")
        await idle(pilot)
        assert "there is no model yet" in notices(pilot)
        assert pilot.app.query_one(Composer).text == "Hello"
        assert pilot.app.query("#hello")


async def test_a_folder_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with running(tmp_path / "file" / "chat", tiny) as pilot:
        await say(pilot, "Hello")
        assert len(shown(pilot)) == 2
        assert "Nothing is saved" in notices(pilot)
        assert "Caches are not kept" in notices(pilot)


async def test_a_damaged_conversation(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "conversations").mkdir()
    (tmp_path / "conversations" / "broken.json").write_text("{")
    async with running(tmp_path, tiny) as pilot:
        assert "broken.json is damaged" in notices(pilot)
        await say(pilot, "Hello")


async def test_two_at_once(tiny: Path, tmp_path: Path) -> None:
    async with running(tmp_path, tiny) as first, running(tmp_path, tiny) as second:
        await say(first, "from one")
        await say(second, "from the other")
    async with running(tmp_path, tiny) as pilot:
        assert {each.title for each in pilot.app.desk.conversations} == {"from one", "from the other"}
