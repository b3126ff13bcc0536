"""Saves conversations and settings as JSON files in a folder, in a background thread."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_kvcache.persist.atomic import replacing

from .events import Changed
from .settings import Settings
from .tree import Conversation

SUFFIX = ".json"


def default_folder() -> Path:
    """The data folder: MLX_KVCACHE_CHAT, or a folder below XDG_DATA_HOME."""
    if named := os.environ.get("MLX_KVCACHE_CHAT"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "mlx_kvcache" / "chat"


class Library:
    """A folder of conversations, which several chats may use at once.

    Saving merges the messages of a file with those of the chat. Messages have unique ids and
    never change, so two chats can add to one conversation.

    Args:
        folder: the folder, created if missing; None saves nothing.
        complain: called in another thread with a message when something cannot be saved.

    Attributes:
        problems: messages about files that could not be read.
    """

    def __init__(self, folder: Path | None, complain: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self._complain = complain
        self._stamps: dict[str, Any] = {}
        self._writer = ThreadPoolExecutor(1, "library")

    @property
    def caches(self) -> Path | None:
        """The folder for caches; None if nothing is saved."""
        return self.folder and self.folder / "caches"

    def load(self) -> list[Conversation]:
        """Load all conversations, the last changed first.

        Damaged files are moved to the folder `damaged` and named in `problems`.
        """
        found = []
        for path in sorted(self._folder("conversations").glob(f"*{SUFFIX}")) if self.folder else ():
            with self._aside(path):
                self._stamps[path.name] = _stamp(path)
                found.append(Conversation.of(json.loads(path.read_text("utf-8"))))
        return sorted(found, key=lambda conversation: -conversation.changed)

    def load_state(self) -> tuple[Settings, dict[str, Any]]:
        """Load the settings and other saved values: model, theme, the current conversation."""
        path = self._folder("state.json") if self.folder else None
        if path and path.exists():
            with self._aside(path):
                saved = json.loads(path.read_text("utf-8"))
                other = {name: value for name, value in saved["other"].items() if isinstance(value, str)}
                return Settings.of(saved["settings"]), other
        return Settings(), {}

    def save_state(self, settings: Settings, other: dict[str, Any]) -> None:
        self._later("state.json", lambda: {"settings": asdict(settings), "other": other})

    def save(self, conversation: Conversation) -> None:
        """Save a conversation in the background, keeping messages that another chat has added."""
        saved = conversation.as_json()
        self._later(f"conversations/{conversation.id}{SUFFIX}", lambda: saved, _joined)

    def delete(self, conversation: Conversation) -> None:
        """Move a conversation to the folder `deleted`."""
        if self.folder:
            self._writer.submit(self._move, self._file(conversation), "deleted")

    def refresh(self, tell: Callable[[Changed], None]) -> None:
        """Tell in another thread what other chats have written since the last time, if they have."""
        # A library that is closed has nothing more to tell.
        with contextlib.suppress(RuntimeError):
            if self.folder:
                self._writer.submit(self._refresh, tell)

    def flush(self) -> None:
        """Wait until everything is saved."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        self._writer.shutdown()

    def _folder(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _file(self, conversation: Conversation) -> Path:
        return self._folder("conversations") / f"{conversation.id}{SUFFIX}"

    def _refresh(self, tell: Callable[[Changed], None]) -> None:
        paths = {path.name: path for path in self._folder("conversations").glob(f"*{SUFFIX}")}
        gone = [name for name in self._stamps if name not in paths]
        changed = []
        for name, path in paths.items():
            # A file that has just gone or is damaged is reported at the next start.
            with contextlib.suppress(OSError, ValueError, RecursionError):
                if (stamp := _stamp(path)) != self._stamps.get(name):
                    self._stamps[name] = stamp
                    changed.append(Conversation.of(json.loads(path.read_text("utf-8"))))
        for name in gone:
            del self._stamps[name]
        if changed or gone:
            tell(Changed(changed, [name.removesuffix(SUFFIX) for name in gone]))

    @contextlib.contextmanager
    def _aside(self, path: Path) -> Iterator[None]:
        """Report errors of reading a file in `problems`, and move a damaged file to `damaged`."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.problems.append(f"{path.name} is damaged and was set aside in damaged/: {error}")
            self._move(path, "damaged")
        except OSError as error:
            self.problems.append(f"{path.name} cannot be read: {error}")

    def _move(self, path: Path, where: str) -> None:
        try:
            target = self._folder(where) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.stem}_{SUFFIX}")
            path.rename(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(f"{path.name} cannot be moved to {where}/: {error}")

    def _later(
        self,
        name: str,
        content: Callable[[], dict[str, Any]],
        join: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda ours, theirs: ours,
    ) -> None:
        if self.folder:
            self._writer.submit(self._write, self._folder(name), content(), join)

    def _write(self, path: Path, content: Any, join: Callable[[Any, Any], Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder("lock")):
                joined = content
                with contextlib.suppress(OSError, ValueError):
                    joined = join(content, json.loads(path.read_text("utf-8")))
                with replacing(path) as file:
                    file.write(json.dumps(joined, ensure_ascii=True).encode())
                if joined == content and path.parent.name == "conversations":
                    self._stamps[path.name] = _stamp(path)
        except OSError as error:
            self._complain(f"Nothing is saved: {error}")


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is replaced."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ino


def _joined(ours: dict[str, Any], theirs: Any) -> dict[str, Any]:
    """Add the messages of a saved conversation to ours, except those taken back."""
    try:
        names = {message["id"] for message in ours["messages"]}.union(ours["gone"])
        added = [message for message in theirs["messages"] if message["id"] not in names]
        return ours | {"messages": ours["messages"] + added}
    except (KeyError, TypeError):
        return ours


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
