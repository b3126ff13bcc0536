"""Models by folder, by the wheel, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.chat import models
from examples.chat.attachment import CannotRead, read_text
from examples.chat.events import Loading


def test_a_folder(tiny: Path) -> None:
    events: list[Any] = []
    model, tokenizer = models.load(str(tiny), events.append)
    assert len(model.layers) == 2
    assert tokenizer.chat_template
    shares = [event.share for event in events]
    assert all(isinstance(event, Loading) for event in events)
    assert shares[0] is None
    assert shares[1:] == sorted(shares[1:])
    assert shares[-1] == 1.0


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "word", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(models.CannotLoad, match="there is no folder"):
        models.load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(models.CannotLoad, match="cannot load"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(models.CannotLoad, match="cannot load"):
        models.load(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(models.CannotLoad, match="cannot load nobody/nothing"):
        models.load("nobody/nothing")


def test_models_on_this_machine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert models.cached_models() == []
    for name in ("models--some--one/snapshots/1", "models--some--two--b/snapshots/2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "models--some--two--b" / "snapshots" / "2" / "model.safetensors").write_text("")
    assert models.cached_models() == ["some/two--b"]
    assert models.models_in(tiny) == [tiny]
    assert tiny in models.models_in(tiny.parent)
    assert models.models_in(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\xff\xfe", "UTF-8"), (b"a\0b", "zero bytes"), (b" \n", "empty")],
)
def test_files_that_cannot_be_attached(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(CannotRead, match=reason):
        read_text(str(tmp_path / "file"))


def test_suggestions_go_up() -> None:
    needed = [suggestion.memory for suggestion in models.SUGGESTIONS]
    assert needed == sorted(needed)
    assert models.memory() > 0.5
