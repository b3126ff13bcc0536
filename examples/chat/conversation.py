"""A conversation on one prompt cache: what is said, what is cached, and how they stay in step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache

Message = dict[str, str]


@dataclass(frozen=True)
class Mark:
    """So much text of the rendered conversation is so many tokens."""

    text: int
    tokens: int


@dataclass
class Answer:
    """What one answer cost."""

    reused: int = 0
    prefilled: int = 0
    generated: int = 0
    forgotten: int = 0
    seconds: float = 0.0
    first_token: float = 0.0
    cache_bytes: int = 0

    def __str__(self) -> str:
        rate = (self.generated - 1) / self.seconds if self.seconds and self.generated > 1 else 0.0
        forgotten = f"{self.forgotten} forgotten, " if self.forgotten else ""
        return (
            f"{self.reused} tokens reused, {self.prefilled} prefilled, {forgotten}{self.generated} generated "
            f"at {rate:.1f} tokens/s, cache {self.cache_bytes / 1e6:.1f} MB"
        )


class TooLong(ValueError):
    """A message that cannot fit even an otherwise empty conversation."""


@dataclass
class Conversation:
    """Messages, the first of them the system prompt, and a cache of their tokens.

    `text` and `tokens` are the conversation as the model read and wrote it. `marks` are the
    places where both are known to correspond: the ends of prompts and of answers. A changed
    conversation is continued from the last mark before the change.

    Args:
        capacity: the most tokens in the cache, or None. When it is reached, the oldest turns
            after the system prompt are taken out of the cache and of the messages.
    """

    model: Any
    tokenizer: Any
    system: str
    capacity: int | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    total: Answer = field(default_factory=Answer)

    def __post_init__(self) -> None:
        self.messages = [{"role": "system", "content": self.system}]
        self.cache: PromptCache = make_prompt_cache(self.model, capacity=self.capacity)
        self.text = ""
        self.tokens: list[int] = []
        self.marks = [Mark(0, 0)]
        self.answer = Answer()

    def ask(self, message: str, instead_of: int | None = None) -> Iterator[str]:
        """Say something and stream the answer; `answer` then tells what it cost.

        Args:
            instead_of: the turn (1 is the first) that this takes the place of, those after
                it gone too; None adds a turn.

        Raises:
            TooLong, IndexError: and nothing has changed.
        """
        before = self.messages
        if instead_of is not None:
            self.messages = before[: self._start_of(instead_of)]
        self.messages = [*self.messages, {"role": "user", "content": message}]
        try:
            prompt = self._prepare()
        except TooLong:
            self.messages = before
            raise
        yield from self._reply(prompt)

    def regenerate(self) -> Iterator[str]:
        """Answer the last message again. Raises IndexError if there is none."""
        message = self.messages[self._start_of(self.turns)]["content"]
        yield from self.ask(message, instead_of=self.turns)

    def undo(self) -> str:
        """Take the last message and its answer back and return it. Raises IndexError if there is none."""
        start = self._start_of(self.turns)
        message = self.messages[start]["content"]
        self.messages = self.messages[:start]
        return message

    def _start_of(self, turn: int) -> int:
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not 1 <= turn <= len(starts):
            raise IndexError(f"there is no message {turn}; there are {len(starts)}")
        return starts[turn - 1]

    @property
    def turns(self) -> int:
        """How many messages of the user there are."""
        return sum(message["role"] == "user" for message in self.messages)

    def fork(self) -> Conversation:
        """A branch that shares what has been said so far, and its cache, without copying."""
        branch = copy(self)
        branch.total, branch.marks, branch.tokens = replace(self.total), list(self.marks), list(self.tokens)
        branch.messages = [dict(message) for message in self.messages]
        branch.cache = self.cache.fork()
        return branch

    def _prepare(self) -> list[int]:
        """Bring the cache to what of it can be reused; returns the tokens that are left to read."""
        self.answer = Answer()
        self._check_fits()
        while True:
            text = self._render(self.messages)
            mark = max((m for m in self.marks if self._same_start(text, m)), key=lambda m: m.tokens)
            new = self.tokenizer.encode(text[mark.text :], add_special_tokens=False)
            # The model needs at least one token to answer from.
            kept = min(mark.tokens, self.cache.position, mark.tokens + len(new) - 1)
            prompt = self.tokens[kept : mark.tokens] + new
            if self.capacity is None or kept + len(prompt) + self._reply_room() <= self.capacity:
                break
            self._forget_oldest_turn()
        self.cache.rewind_to(kept)
        self.text, self.tokens = text, self.tokens[: mark.tokens] + new
        self.marks = [m for m in self.marks if m.tokens <= mark.tokens]
        self._mark()
        self.answer.reused, self.answer.prefilled = kept, len(prompt)
        return prompt

    def _reply(self, prompt: list[int]) -> Iterator[str]:
        room = self.max_tokens if self.capacity is None else self.capacity - len(self.tokens) - 1
        sampler = make_sampler(self.temperature)
        start = time.perf_counter()
        written, reply = "", ""
        try:
            for part in stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                max_tokens=min(self.max_tokens, room),
                prompt_cache=self.cache,
                sampler=sampler,
            ):
                if not self.answer.generated:
                    self.answer.first_token = time.perf_counter() - start
                    start = time.perf_counter()
                self.answer.generated += 1
                self.tokens.append(part.token)
                reply += part.text
                written += part.text if part.finish_reason != "stop" else part.text + self._ending(part.token)
                yield part.text
        finally:
            # Also when the reader stops early: what was said and cached stays.
            self.answer.seconds = time.perf_counter() - start
            self.answer.cache_bytes = self.cache.nbytes
            self.text += written
            self._mark()
            self.messages.append({"role": "assistant", "content": reply})
            self._add_up()

    def _ending(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _reply_room(self) -> int:
        assert self.capacity is not None
        return min(self.max_tokens, self.capacity // 4)

    def _check_fits(self) -> None:
        """Raise TooLong if the last message does not fit with the system prompt alone."""
        alone = self._tokens_in(self._render([self.messages[0], self.messages[-1]]))
        if self.capacity is not None and alone + self._reply_room() > self.capacity:
            needed = alone + self._reply_room()
            raise TooLong(
                f"with room for an answer that takes {needed} tokens, and the capacity is {self.capacity}"
            )

    def _forget_oldest_turn(self) -> None:
        """Take the oldest message and its answer out, and re-base what comes after them."""
        first, second = self._start_of(1), self._start_of(2)
        head = self._render(self.messages[:first], answer=False)
        gone = self._render(self.messages[:second], answer=False)
        self.messages = self.messages[:first] + self.messages[second:]
        begin, end = self._tokens_in(head), self._tokens_in(gone)
        if not self.text.startswith(gone) or end > self.cache.position:
            return  # That turn is not cached as it stands; rendering anew is enough.
        try:
            self.cache.remove(begin, end)
        except NotSupportedError:
            self.cache.rewind_to(0)
            self.text, self.tokens, self.marks = "", [], [Mark(0, 0)]
            return
        del self.tokens[begin:end]
        self.text = head + self.text[len(gone) :]
        moved = [
            Mark(m.text - len(gone) + len(head), m.tokens - end + begin) for m in self.marks if m.tokens > end
        ]
        self.marks = [Mark(0, 0), Mark(len(head), begin), *moved]
        self.answer.forgotten += end - begin

    def _tokens_in(self, start: str) -> int:
        return len(self.tokenizer.encode(start, add_special_tokens=False))

    def _render(self, messages: list[Message], answer: bool = True) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
        return rendered

    def _same_start(self, text: str, mark: Mark) -> bool:
        return mark.text <= len(self.text) and text[: mark.text] == self.text[: mark.text]

    def _mark(self) -> None:
        self.marks.append(Mark(len(self.text), len(self.tokens)))

    def _add_up(self) -> None:
        for name in ("reused", "prefilled", "generated", "forgotten", "seconds"):
            setattr(self.total, name, getattr(self.total, name) + getattr(self.answer, name))
        self.total.cache_bytes = self.answer.cache_bytes
