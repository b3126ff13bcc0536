"""The application's conversations, settings and ends, by its keys."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Markdown, OptionList

from examples.chat.ui.composer import Composer
from examples.chat.ui.settings import FIELDS
from examples.chat.ui.transcript import Earlier, MessageView, Transcript, Writing

from .running import (
    closed,
    dialog,
    endless,
    idle,
    more,
    notices,
    press,
    running,
    say,
    shown,
    texts,
    typed,
    until,
    write,
)


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
        await dialog(pilot, "enter", "f2")
        await typed(pilot, "fruit")
        await pilot.press("enter")
        await closed(pilot)
        assert desk.conversations[1].title == "fruit"
        await pilot.press("ctrl+o", "ctrl+o")
        await typed(pilot, "fruit")
        # Down goes from the search into the list.
        await pilot.press("down", "enter")
        await idle(pilot)
        assert texts(pilot) == ["apples"]
        await dialog(pilot, "ctrl+o", "down", "f8")
        await pilot.press("enter")
        await closed(pilot)
        assert [each.title for each in desk.conversations] == ["pears"]
        assert texts(pilot) == ["pears"]
        assert len(list((tmp_path / "deleted").iterdir())) == 1


async def set_fields(pilot: Any, **values: str) -> None:
    """Fill in the dialog of settings from its first field on, by keys, and save it."""
    at = 0
    for name, value in values.items():
        place = list(FIELDS).index(name)
        await press(pilot, *["down" if place > at else "up"] * abs(place - at))
        assert pilot.app.focused.id == name
        await typed(pilot, value)
        at = place
    await press(pilot, "ctrl+s")


def wrong(pilot: Any) -> str:
    return str(pilot.app.screen.query_one("#wrong").render())


async def test_settings(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        before = pilot.app.desk.settings
        await dialog(pilot, "f4")
        await typed(pilot, "3")
        await pilot.press("enter")
        assert "64 or more, got 3" in wrong(pilot)
        await typed(pilot, "x")
        await pilot.press("enter")
        assert "must be a number" in wrong(pilot)
        # A capacity that no machine has memory for is questioned once.
        await typed(pilot, "1000000000000")
        await pilot.press("enter")
        assert "does not fit this machine's memory" in wrong(pilot)
        assert pilot.app.desk.settings == before
        values = {"capacity": "128", "window": "32", "bits": "8", "temperature": "0.5", "seed": "7"}
        await set_fields(pilot, **values)
        await closed(pilot)
        settings = pilot.app.desk.settings
        assert (settings.capacity, settings.window, settings.bits, settings.temperature) == (128, 32, 8, 0.5)
        assert settings.seed == 7
        assert pilot.app.desk.seen.capacity == 128
        await say(pilot, "Again")
        [holding] = pilot.app.desk.seen.holdings
        assert holding.rule.size == 32
        assert holding.packed
        # Nothing changes where it is canceled.
        await dialog(pilot, "f4")
        await typed(pilot, "200")
        await pilot.press("escape")
        await closed(pilot)
        assert pilot.app.desk.settings == settings


async def test_settings_that_the_model_cannot_have(odd: Path) -> None:
    async with running(None, odd) as pilot:
        before = pilot.app.desk.settings
        await dialog(pilot, "f4")
        await set_fields(pilot, bits="8")
        await closed(pilot)
        assert "48" in notices(pilot)
        assert pilot.app.desk.settings == before
        await say(pilot, "Hello")
        assert len(shown(pilot)) == 2


async def test_system_prompt(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await dialog(pilot, "f3")
        await typed(pilot, "Speak like a pirate.")
        # Tab reaches the buttons, of which enter presses one.
        await pilot.press("tab", "enter")
        await closed(pilot)
        assert pilot.app.desk.current.system == "Speak like a pirate."
        await say(pilot, "Hello again")
        assert pilot.app.desk.current.path[-1].cost.reused < pilot.app.desk.current.path[-1].cost.prefilled


@pytest.mark.parametrize("size", [(80, 24)])
async def test_every_dialog_and_message_by_keys(tiny: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("the first line\nthe second line\n")
    shutil.copytree(tiny, tmp_path / "models" / "other")
    async with running(tmp_path / "data", tiny, size=size) as pilot:
        desk = pilot.app.desk
        await dialog(pilot, "ctrl+t")
        await typed(pilot, str(notes))
        await pilot.press("enter")
        await closed(pilot)
        assert pilot.app.composer.text == "[notes.txt, 30 characters] "
        await pilot.press("enter")
        await idle(pilot)
        assert texts(pilot) == ["notes.txt:\n\nthe first line\nthe second line"]
        await dialog(pilot, "ctrl+t")
        await typed(pilot, str(tmp_path))
        await pilot.press("enter")
        await closed(pilot)
        assert "Is a directory" in notices(pilot)
        # A reply that was cut goes on, as an alternative to it.
        cut = desk.current.path[-1]
        assert cut.ended == "length"
        await pilot.press("ctrl+g")
        await idle(pilot)
        longer = desk.current.path[-1]
        assert longer.text.startswith(cut.text)
        assert len(longer.piece.tokens) == 16
        await pilot.press("shift+tab", "g")
        await idle(pilot)
        assert len(desk.current.path[-1].piece.tokens) == 24
        await dialog(pilot, "ctrl+b")
        tree = pilot.app.focused
        labels = [str(tree.get_node_at_line(line).label) for line in range(tree.last_line + 1)]
        assert labels[0].startswith("● You: notes.txt")
        assert [label[:13] for label in labels[1:4]] == ["○  1 of 3  Mo", "○  2 of 3  Mo", "●  3 of 3  Mo"]
        await pilot.press("up", "up", "enter")
        await closed(pilot)
        assert desk.current.path[-1] is cut
        # What is typed finds models; that of a folder can be chosen by the arrows.
        await dialog(pilot, "f5")
        await typed(pilot, "qwen3-4b")
        options = pilot.app.screen.query_one(OptionList)
        assert [option.id for option in options.options] == ["mlx-community/Qwen3-4B-4bit"]
        await typed(pilot, str(tmp_path / "models"))
        await pilot.press("down", "enter")
        await closed(pilot)
        assert desk.model == str(tmp_path / "models" / "other")
        await dialog(pilot, "?")
        await pilot.press("pagedown", "escape")
        await closed(pilot)


async def test_thinking_is_folded(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        reply = pilot.app.desk.current.path[-1]
        thought = "<think>\nWhat is this?\nA greeting.</think>\n\nGood day."
        pilot.app.desk.current.messages[reply.id] = replace(reply, text=thought, ended="stopped")
        await pilot.app.show()
        view = pilot.app.query(MessageView).last()
        assert "thought for 5 words" in str(view.query_one(".thought").render())
        assert view.query_one(Markdown).source == "Good day."
        assert not view.query_one(".thinking").display
        await pilot.press("shift+tab", "t")
        assert view.query_one(".thinking").display
        # While it is written, the number of its words is shown.
        writing = Writing("model")
        await pilot.app.query_one(Transcript).mount(writing)
        for part in ("<thi", "nk>one ", "two", "</think>", "Good ", "day."):
            await writing.write(part)
        await writing.finish()
        assert "thought for 2 words" in str(writing.query_one(".thought").render())
        assert writing.query_one(Markdown).source == "Good day."


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
        await dialog(pilot, "f5")
        await typed(pilot, str(tmp_path / "nothing"))
        await pilot.press("enter")
        await closed(pilot)
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
        # Each sees what the other has written, also in the conversation on its screen.
        await until(first, lambda: len(first.app.desk.conversations) == 2)
        await until(second, lambda: len(second.app.desk.conversations) == 2)
        await second.press("ctrl+o", "down", "down", "enter")
        await idle(second)
        await say(second, "and more")
        await until(first, lambda: shown(first)[::2] == ["from one", "and more"])
    async with running(tmp_path, tiny) as pilot:
        assert {each.title for each in pilot.app.desk.conversations} == {"from one", "from the other"}
