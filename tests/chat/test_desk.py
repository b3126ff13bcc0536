"""What is saved when there is no time to wait for the model."""

from __future__ import annotations

from pathlib import Path

from examples.chat.desk import Desk
from examples.chat.events import Said
from examples.chat.library import Library
from examples.chat.worker import Worker


def desk_in(folder: Path) -> Desk:
    """A desk whose worker does nothing."""
    library = Library(folder)
    settings, other = library.load_state()
    return Desk(library, Worker(lambda event: None, None), "Be brief.", settings, other)


def test_a_reply_is_saved_as_far_as_it_was_told(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    desk.ask("Hello")
    desk.heed(Said("Nice "))
    desk.tell(Said("to meet"))
    desk.secure()
    assert desk.heed_next() is None
    again = desk_in(tmp_path)
    assert [(m.text, m.ended) for m in again.current.path] == [("Hello", ""), ("Nice to meet", "stopped")]
    # It can be gone on from: how the model wrote it is not known, so it will be read.
    assert again.current.path[1].piece is None


def test_twice_and_after_the_end(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    desk.ask("Hello")
    desk.tell(Said("Nice"))
    desk.secure()
    desk.secure()
    desk.library.close()
    desk.secure()
    assert len(desk_in(tmp_path).current.path) == 2
