"""Holds the chat's state: conversations, settings and the reply in progress. Uses no screen and no MLX."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .events import Changed, Event, Failed, Progress, Ready, Said, Seen, Stored
from .library import Library
from .settings import Settings
from .tree import Conversation, Message, Replied, cleaned, new_id
from .worker import CONFIGURE, LOAD, REPLY, Worker

SURVEYED = 16
"""The number of newest conversations of which the tokens on disk are counted."""


class Refused(Exception):
    """The action is not possible now; nothing has changed. The message gives the reason."""


@dataclass
class Pending:
    """A reply in progress.

    Attributes:
        last: the user's message that it answers.
        name: the id of the reply's message.
        before: the leaf of the conversation before this reply was requested.
        is_new: whether `last` was added for this reply.
        text: the reply so far.
        progress: its statistics so far; None before it has begun.
    """

    conversation: Conversation
    last: Message
    name: str
    before: str | None
    is_new: bool
    text: str = ""
    progress: Progress | None = None


class Desk:
    """All conversations and the actions on them; one conversation is current.

    Args:
        system: the system prompt of new conversations.
        other: other saved values, such as the model's name.

    Attributes:
        current: the conversation on the screen.
        pending: the reply in progress, or None.
        seen: the newest report on the caches, or None.
        on_disk: the numbers of tokens that files hold, by the ids of conversations.
        returned: the text of a message that could not be answered, for the user to try again.
    """

    def __init__(
        self, library: Library, worker: Worker, system: str, settings: Settings, other: dict[str, Any]
    ) -> None:
        self.library = library
        self.worker = worker
        self.system = system
        self.settings = self._settings_before = settings
        self.other = other
        self._good: str | None = None
        self._told: deque[Event] = deque()
        self._heeding = threading.Lock()
        self.conversations = library.load()
        self.pending: Pending | None = None
        self.seen: Seen | None = None
        self.on_disk: dict[str, int] = {}
        self.returned = ""
        opened = {conversation.id: conversation for conversation in self.conversations}
        self.current = opened.get(other.get("conversation", "")) or self._fresh()

    @property
    def model(self) -> str | None:
        """The name of the chosen model; None for the default."""
        name: str | None = self.other.get("model")
        return name

    @property
    def order(self) -> dict[str, int]:
        """The rank of each conversation by age, which determines its color."""
        by_age = sorted(self.conversations, key=lambda conversation: conversation.created)
        return {conversation.id: place for place, conversation in enumerate(by_age)}

    @property
    def is_shown(self) -> bool:
        """Whether the reply in progress is on the current branch."""
        return (
            self.pending is not None
            and self.pending.conversation is self.current
            and self.current.leaf == self.pending.last.id
        )

    def begin(self) -> None:
        """Request the chosen model, before any other request."""
        self.worker.load(self.model, self.settings)
        self._look()
        self.worker.survey(self.conversations[:SURVEYED])

    def load(self, model: str | None) -> None:
        """Load another model."""
        self._check_idle()
        self.other["model"] = model
        self.begin()
        self._keep()

    def new(self) -> None:
        """Start a new conversation."""
        if self.current.messages:
            self.current = self._fresh()
        self._look()

    def open(self, id: str) -> None:  # noqa: A002
        """Make another conversation current."""
        self.current = next(each for each in self.conversations if each.id == id)
        self._look()

    def rename(self, conversation: Conversation, title: str) -> None:
        title = cleaned(title).strip()
        if not title:
            raise Refused("a conversation needs a title")
        conversation.title = title
        self._list(conversation)

    def delete(self, conversation: Conversation) -> None:
        """Delete a conversation; its file moves to the folder `deleted`."""
        if self.pending and self.pending.conversation is conversation:
            raise Refused("a reply is being written there; stop it first")
        if conversation in self.conversations:
            self.conversations.remove(conversation)
            self.library.delete(conversation)
        if conversation is self.current:
            self.current = self.conversations[0] if self.conversations else self._fresh()
            self._look()

    def find(self, words: str) -> list[Conversation]:
        """Find the conversations that contain all these words in their titles or messages."""
        wanted = words.lower().split()
        return [each for each in self.conversations if not wanted or _has_all(each, wanted)]

    def ask(self, text: str) -> Message:
        """Send a message at the end of the branch."""
        return self._say(text, self.current.leaf)

    def edit(self, message: Message, text: str) -> Message:
        """Send a message in place of an earlier one, on a new branch."""
        if message.role != "user":
            raise Refused("only your own messages can be edited; a reply can be made again")
        return self._say(text, message.parent)

    def regenerate(self, message: Message | None = None) -> None:
        """Generate a reply again, on a new branch; None means the last reply of the branch."""
        self._check_idle()
        path = self.current.path_to(message.id) if message else self.current.path
        asked = [each for each in path if each.role == "user"]
        if not asked:
            raise Refused("there is nothing to answer yet")
        before, self.current.leaf = self.current.leaf, asked[-1].id
        self._answer(asked[-1], before, is_new=False)

    def go_on(self, message: Message | None = None) -> None:
        """Continue a reply that was cut, on a new branch; None means the last message of the branch."""
        self._check_idle()
        path = self.current.path_to(message.id) if message else self.current.path
        if not path or path[-1].role != "assistant" or not path[-1].ended:
            raise Refused("the last reply is complete; only a reply that was cut can be continued")
        before, self.current.leaf = self.current.leaf, path[-2].id
        self._answer(path[-2], before, is_new=False, begun=path[-1])

    def look_at(self, message: Message) -> None:
        """Switch to the branch of a message."""
        self.current.look_at(message.id)
        self.library.save(self.current)
        self._look()

    def set_system(self, text: str) -> None:
        """Change the system prompt of the current conversation."""
        self._check_idle()
        self.current.system = cleaned(text).strip()
        if self.current.messages:
            self.library.save(self.current)

    def set(self, settings: Settings) -> None:
        self._check_idle()
        self._settings_before, self.settings = self.settings, settings
        self.worker.configure(settings)
        self._look()
        self._keep()

    def stop(self) -> bool:
        """Stop the reply in progress. Returns whether there is one."""
        self.worker.stop()
        return self.pending is not None

    def tell(self, event: Event) -> None:
        """Queue an event from the worker for `heed_next`. Thread-safe."""
        self._told.append(event)

    def heed_next(self) -> Event | None:
        """Process the next queued event and return it; None if `secure` has already processed it."""
        with self._heeding:
            event = self._told.popleft() if self._told else None
            if event is not None:
                self.heed(event)
            return event

    def heed(self, event: Event) -> None:
        """Process an event from the worker."""
        if isinstance(event, Seen):
            self.seen = event
        elif isinstance(event, Said) and self.pending:
            self.pending.text += event.text
        elif isinstance(event, Progress) and self.pending:
            self.pending.progress = event
        elif isinstance(event, Replied) and self.pending:
            pending, self.pending = self.pending, None
            pending.conversation.take(pending.last, pending.name, event)
            self.library.save(pending.conversation)
            self.worker.survey(self.conversations[:SURVEYED])
        elif isinstance(event, Stored):
            self.on_disk = event.tokens
        elif isinstance(event, Changed):
            self._merge(event)
        elif isinstance(event, Ready):
            self._good = self.model
        elif isinstance(event, Failed) and event.what == LOAD:
            self.other["model"] = self._good
            self._keep()
        elif isinstance(event, Failed) and event.what == CONFIGURE:
            self.settings = self._settings_before
            self._keep()
        elif isinstance(event, Failed) and event.what == REPLY and self.pending:
            self._take_back()

    def close(self) -> None:
        """Save the state, and close the worker, which saves the caches."""
        self._keep()
        self.worker.close()

    def secure(self) -> None:
        """Save everything at once, including the reply in progress so far. Thread-safe."""
        # A library that is closed has written everything, and takes no more.
        with suppress(RuntimeError):
            with self._heeding:
                while self._told:
                    self.heed(self._told.popleft())
                if self.pending and self.pending.text:
                    start = self.pending.last.start
                    self.heed(Replied(self.pending.text, None, None, (start, start), None, "stopped"))
            self._keep()
            self.library.flush()

    def _say(self, text: str, parent: str | None) -> Message:
        text = cleaned(text).strip()
        if not text:
            raise Refused("there is nothing in it")
        self._check_idle()
        before = self.current.leaf
        message = self.current.say(text, parent)
        self._list(self.current)
        self._answer(message, before, is_new=True)
        return message

    def _answer(self, last: Message, before: str | None, is_new: bool, begun: Message | None = None) -> None:
        """Request the reply to a message, or the rest of one that has begun."""
        text = begun.text if begun else ""
        self.pending = Pending(self.current, last, new_id(), before, is_new, text)
        self.worker.reply(self.current, begun or last, self.pending.name)

    def _take_back(self) -> None:
        """Undo a reply that failed: restore the conversation as it was before the message."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        conversation = pending.conversation
        if pending.is_new:
            self.returned = pending.last.text
            conversation.take_back(pending.last, pending.before)
        elif conversation.leaf == pending.last.id:
            conversation.leaf = pending.before
        if not conversation.messages:
            conversation.title = ""
            self.conversations.remove(conversation)
            self.library.delete(conversation)
        else:
            self.library.save(conversation)

    def _check_idle(self) -> None:
        if self.pending:
            raise Refused("a reply is being written; stop it first")

    def _list(self, conversation: Conversation) -> None:
        """Add a conversation to the list, if it is new, and save it."""
        if conversation not in self.conversations:
            self.conversations.insert(0, conversation)
        self.library.save(conversation)

    def _merge(self, event: Changed) -> None:
        """Take over what another chat has written and deleted."""
        known = {conversation.id: conversation for conversation in self.conversations}
        for theirs in event.conversations:
            ours = known.get(theirs.id)
            if ours is None:
                self.conversations.insert(0, theirs)
            else:
                ours.merge(theirs)
                # What goes on from the branch on the screen is shown.
                if not self.pending or self.pending.conversation is not ours:
                    ours.look_at(ours.leaf)
        for name in event.gone:
            busy = {self.current.id, self.pending.conversation.id if self.pending else ""}
            if name in known and name not in busy:
                self.conversations.remove(known[name])

    def _fresh(self) -> Conversation:
        return Conversation(system=self.system)

    def _look(self) -> None:
        self.worker.warm(self.current)

    def _keep(self) -> None:
        self.other["conversation"] = self.current.id
        self.library.save_state(self.settings, dict(self.other))


def _has_all(conversation: Conversation, words: list[str]) -> bool:
    texts = [conversation.title, *(message.text for message in conversation.messages.values())]
    content = "\n".join(texts).lower()
    return all(word in content for word in words)
