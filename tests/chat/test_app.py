"""Conversing, editing and branching in the application, by its keys."""

from __future__ import annotations

from pathlib import Path

from textual import events
from textual.widgets import Tree

from examples.chat.ui.composer import PASTE, Composer
from examples.chat.ui.transcript import Forgotten, MessageView, Transcript

from .running import chat, endless, idle, more, notices, ready, running, say, shown, texts, until


async def test_a_conversation(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        assert pilot.app.query("#hello")
        await say(pilot, "Hello there")
        await say(pilot, "And again")
        path = pilot.app.desk.current.path
        assert shown(pilot) == [message.text for message in path]
        assert len(path) == 4
        assert path[3].cost.reused > 0
        assert not pilot.app.query("#hello")
        assert "Hello there" in str(pilot.app.query_one("#title").render())


async def test_a_message_before_the_model_is_there(tiny: Path) -> None:
    app = chat(None, tiny)
    async with app.run_test() as pilot:
        app.desk.ask("Hello")
        await ready(pilot)
        assert len(app.desk.current.path) == 2


async def test_edit_reads_the_change_only(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        for turn in range(4):
            await say(pilot, f"Question {turn}")
        await pilot.press("ctrl+e")
        composer = pilot.app.query_one(Composer)
        assert composer.text == "Question 3"
        await pilot.press("!", "enter")
        await idle(pilot)
        last = pilot.app.desk.current.path[-1]
        assert texts(pilot)[-1] == "Question 3!"
        assert last.cost.prefilled <= 8
        assert len(pilot.app.desk.current.path) == 8
        # Switching reads nothing.
        read = pilot.app.desk.seen.totals.prefilled
        await pilot.press("alt+left")
        await idle(pilot)
        assert texts(pilot)[-1] == "Question 3"
        assert pilot.app.desk.seen.totals.prefilled == read
        await pilot.press("alt+right")
        await idle(pilot)
        assert texts(pilot)[-1] == "Question 3!"


async def test_editing_can_be_left(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await pilot.press("ctrl+e", "x", "escape")
        assert pilot.app.query_one(Composer).text == ""
        assert texts(pilot) == ["Hello"]
        await say(pilot, "More")
        assert texts(pilot) == ["Hello", "More"]


async def test_any_earlier_message_by_its_keys(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "one")
        await say(pilot, "two")
        pilot.app.query(MessageView).first().focus()
        await pilot.press("e", "!", "enter")
        await idle(pilot)
        assert texts(pilot) == ["one!"]
        pilot.app.query(MessageView).first().focus()
        await pilot.press("left")
        await idle(pilot)
        assert texts(pilot) == ["one", "two"]
        pilot.app.query(MessageView)[1].focus()
        await pilot.press("r")
        await idle(pilot)
        assert texts(pilot) == ["one"]
        pilot.app.query(MessageView)[1].focus()
        await pilot.press("c")
        assert pilot.app.clipboard == pilot.app.desk.current.path[1].text


async def test_by_mouse(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        header = pilot.app.query(MessageView)[0].query_one(".header")
        await pilot.click(header, offset=(6, 0))
        assert pilot.app.editing is not None


async def test_again_and_branches(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await pilot.press("ctrl+r")
        await idle(pilot)
        first, second = pilot.app.desk.current.beside(pilot.app.desk.current.path[1])
        assert pilot.app.desk.current.path[1] is second
        assert second.cost.prefilled == 1
        await pilot.press("ctrl+b")
        await until(pilot, lambda: isinstance(pilot.app.focused, Tree))
        await pilot.press("up", "enter")
        await idle(pilot)
        assert pilot.app.desk.current.path[1] is first


async def test_stop(tiny: Path) -> None:
    async with endless(None, tiny) as pilot:
        assert pilot.app.query_one(Transcript).writing is not None
        # Everything else has to wait, or is refused.
        await pilot.press("ctrl+r")
        assert "stop it first" in notices(pilot)
        await pilot.press("escape")
        await idle(pilot)
        assert pilot.app.desk.current.path[-1].ended == "stopped"
        assert pilot.app.query_one(Transcript).writing is None


async def test_dialogs_while_a_reply_is_written(tiny: Path) -> None:
    async with endless(None, tiny) as pilot:
        for key in ("f4", "ctrl+b"):
            await pilot.press(key)
            await until(pilot, lambda: len(pilot.app.screen_stack) == 2)
            await more(pilot)
            await pilot.press("escape")
            await until(pilot, lambda: len(pilot.app.screen_stack) == 1)
        await pilot.press("escape")
        await idle(pilot)
        assert len(shown(pilot)) == 2


async def test_editing_ends_with_the_conversation(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        await pilot.press("ctrl+e", "ctrl+n", "enter")
        await idle(pilot)
        assert texts(pilot) == ["Hello"]
        assert len(pilot.app.desk.conversations) == 2


async def test_a_reply_goes_on_behind_another_conversation(tiny: Path) -> None:
    async with endless(None, tiny) as pilot:
        first = pilot.app.desk.current
        await pilot.press("ctrl+n", "escape")
        await idle(pilot)
        assert shown(pilot) == []
        assert len(first.path) == 2


async def test_forgetting_is_marked(tiny: Path) -> None:
    async with running(None, tiny, capacity=96) as pilot:
        for turn in range(5):
            await say(pilot, f"Question number {turn}")
        assert pilot.app.desk.current.path[-1].start > 0
        assert pilot.app.query(Forgotten)
        assert pilot.app.desk.seen.cached <= 96
        assert notices(pilot).count("nearly full") == 1


async def test_a_whole_book_comes_back(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "Hello")
        before = pilot.app.desk.current.path
        book = "word " * 40_000
        composer = pilot.app.query_one(Composer)
        composer.post_message(events.Paste(book))
        await pilot.pause()
        assert len(book) > PASTE > len(composer.text) > 0
        await pilot.press("enter")
        await idle(pilot)
        assert "and the capacity is 512" in notices(pilot)
        assert composer.content.strip() == book.strip()
        assert pilot.app.desk.current.path == before
        await pilot.press("ctrl+a", "ctrl+k")


async def test_pasted_control_characters(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        composer = pilot.app.query_one(Composer)
        composer.post_message(events.Paste("a\x1b[31m\x00b\r\nשלום 👩‍👩‍👧"))
        await pilot.pause()
        assert composer.text == "a[31mb\nשלום 👩‍👩‍👧"
        await pilot.press("enter")
        await idle(pilot)
        assert texts(pilot) == ["a[31mb\nשלום 👩‍👩‍👧"]


async def test_writing(tiny: Path) -> None:
    async with running(None, tiny) as pilot:
        await say(pilot, "first")
        await say(pilot, "second")
        composer = pilot.app.query_one(Composer)
        await pilot.press(*"draft", "ctrl+j", *"more")
        assert composer.text == "draft\nmore"
        await pilot.press("up", "up")
        assert composer.text == "second"
        await pilot.press("up")
        assert composer.text == "first"
        await pilot.press("down", "down")
        assert composer.text == "draft\nmore"
        await pilot.press("ctrl+e")
        await pilot.press("escape", "enter")
        assert len(texts(pilot)) == 2
