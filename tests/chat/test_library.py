"""Saved conversations: there at the next start, whatever happens to the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.chat.library import Library, default_folder
from examples.chat.settings import Settings
from examples.chat.tree import Conversation

from .test_tree import reply, talked


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def library(tmp_path: Path, complaints: list[str]) -> Iterator[Library]:
    library = Library(tmp_path / "chat", complaints.append)
    yield library
    library.close()


def again(library: Library) -> Library:
    library.flush()
    return Library(library.folder)


def test_there_at_the_next_start(library: Library) -> None:
    first, second = talked(), talked(1)
    second.changed = first.changed + 1
    library.save(first)
    library.save(second)
    library.save_state(Settings(window=32), {"theme": "textual-light"})
    other = again(library)
    assert other.load() == [second, first]
    assert other.load_state() == (Settings(window=32), {"theme": "textual-light"})
    assert other.problems == []


def test_what_is_remembered_is_text(library: Library) -> None:
    library.save_state(Settings(), {"theme": 3, "model": "path", "conversation": None})
    assert again(library).load_state() == (Settings(), {"model": "path"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 1}', b"[" * 100_000])
def test_what_is_damaged_is_set_aside_and_named(library: Library, content: bytes) -> None:
    assert library.folder
    conversation = talked()
    library.save(conversation)
    library.flush()
    for name in ("bad.json", "worse.json"):
        (library.folder / "conversations" / name).write_bytes(content)
    (library.folder / "state.json").write_bytes(content)
    other = again(library)
    assert other.load() == [conversation]
    assert other.load_state() == (Settings(), {})
    assert len(other.problems) == 3
    assert "bad.json" in other.problems[0]
    assert "damaged/" in other.problems[0]
    assert sorted(path.name for path in (library.folder / "damaged").iterdir()) == [
        "bad.json",
        "state.json",
        "worse.json",
    ]
    third = again(library)
    assert third.load() == [conversation]
    assert third.problems == []


def test_two_chats_in_one_conversation_lose_nothing(library: Library) -> None:
    conversation = talked(1)
    library.save(conversation)
    other = again(library)
    [theirs] = other.load()
    reply(conversation, conversation.say("ours", conversation.leaf), "to us")
    reply(theirs, theirs.say("theirs", theirs.leaf), "to them")
    library.save(conversation)
    library.flush()
    other.save(theirs)
    [both] = again(other).load()
    assert {m.text for m in both.messages.values()} >= {"ours", "to us", "theirs", "to them"}
    assert both.path[-1].text == "to them"


def test_what_was_taken_back_stays_away(library: Library) -> None:
    conversation = talked(1)
    leaf = conversation.leaf
    message = conversation.say("too long", leaf)
    library.save(conversation)
    conversation.take_back(message, leaf)
    library.save(conversation)
    [saved] = again(library).load()
    assert saved.messages.keys() == conversation.messages.keys()


def test_deleted_ones_can_be_found(library: Library) -> None:
    assert library.folder
    conversation = talked()
    for _ in range(2):
        library.save(conversation)
        library.delete(conversation)
    assert again(library).load() == []
    assert len(list((library.folder / "deleted").iterdir())) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path, complaints: list[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    library = Library(tmp_path / "file" / "chat", complaints.append)
    assert library.load() == []
    library.save(talked())
    library.flush()
    library.close()
    library.refresh(lambda changed: None)
    assert len(complaints) == 1
    assert "Nothing is saved" in complaints[0]


def test_nowhere_to_save() -> None:
    library = Library(None)
    library.save(talked())
    library.delete(talked())
    library.save_state(Settings(), {})
    assert library.load() == []
    assert library.caches is None
    library.close()


def test_text_of_any_kind(library: Library) -> None:
    assert library.folder
    conversation = Conversation()
    reply(conversation, conversation.say("שלום 👩‍👩‍👧 \u202e abc", None), "\U0001f600\n\t")
    library.save(conversation)
    assert again(library).load() == [conversation]
    json.loads((library.folder / "conversations" / f"{conversation.id}.json").read_text("ascii"))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_KVCACHE_CHAT", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("MLX_KVCACHE_CHAT")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "mlx_kvcache" / "chat"
