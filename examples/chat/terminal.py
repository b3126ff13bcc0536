"""Lines in, answers out: the commands of the chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_kvcache import CacheError

from .conversation import Conversation, TooLong

HELP = """\
/undo             take the last message and its answer back
/edit TEXT        say TEXT instead of the last message
/edit N TEXT      say TEXT instead of message N, and go on from there
/regenerate       answer the last message again
/fork             go on in a new branch; the old one stays as it is
/switch N         go to branch N
/stats            what the cache holds and what it has saved
/help             this list
/quit             the end"""


class Terminal:
    """Branches of a conversation and the commands on them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str,
        capacity: int | None,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self.branches = [Conversation(model, tokenizer, system, capacity, max_tokens, temperature)]
        self.current = 0

    @property
    def conversation(self) -> Conversation:
        return self.branches[self.current]

    def handle(self, line: str) -> bool:
        """Act on one line. Returns False when the user leaves."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._say(self.conversation.ask(line))
            return True
        name, _, rest = line[1:].partition(" ")
        commands = {
            "undo": self._undo,
            "edit": self._edit,
            "regenerate": self._regenerate,
            "fork": self._fork,
            "switch": self._switch,
            "stats": self._stats,
            "help": lambda _: print(HELP),
        }
        if name == "quit":
            return False
        if name not in commands:
            print(f"There is no /{name}; /help lists the commands.")
            return True
        try:
            commands[name](rest.strip())
        except IndexError as error:
            print(f"[{error}]")
        return True

    def _say(self, answer: Iterator[str]) -> None:
        try:
            for text in answer:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (TooLong, CacheError, IndexError) as error:
            print(f"[{error}]")
            return
        finally:
            answer.close()  # type: ignore[attr-defined]
        print(f"\n  [{self.conversation.answer}]")

    def _undo(self, _: str) -> None:
        print(f"Taken back: {self.conversation.undo()}")

    def _edit(self, rest: str) -> None:
        first, _, text = rest.partition(" ")
        turn = self.conversation.turns
        if first.isdigit() and text:
            turn, rest = int(first), text
        if not rest:
            print("/edit needs the new text.")
            return
        self._say(self.conversation.ask(rest, instead_of=turn))

    def _regenerate(self, _: str) -> None:
        self._say(self.conversation.regenerate())

    def _fork(self, _: str) -> None:
        before = self.conversation.cache.pool.nbytes
        self.branches.append(self.conversation.fork())
        self.current = len(self.branches) - 1
        more = self.conversation.cache.pool.nbytes - before
        print(f"Branch {self.current + 1} of {len(self.branches)}; it took {more} bytes.")

    def _switch(self, rest: str) -> None:
        if not rest.isdigit() or not 1 <= int(rest) <= len(self.branches):
            raise IndexError(f"there is no branch {rest or '?'}; there are 1 to {len(self.branches)}")
        self.current = int(rest) - 1
        print(f"Branch {rest} of {len(self.branches)}.")

    def _stats(self, _: str) -> None:
        cache, total = self.conversation.cache, self.conversation.total
        capacity = f" of {cache.capacity}" if cache.capacity else ""
        print(f"{cache.position}{capacity} tokens cached, {cache.nbytes / 1e6:.1f} MB")
        print(f"{len(self.branches)} branches, {cache.pool.nbytes / 1e6:.1f} MB allocated for them all")
        print(
            f"so far: {total.reused} tokens reused, {total.prefilled} prefilled, {total.forgotten} forgotten"
        )
