"""Generates replies; finds the caches by the tokens of the conversation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_kvcache import CacheFileError
from mlx_kvcache.plugin import make_session_pool
from mlx_kvcache.plugin.pool.weights import fingerprint
from mlx_kvcache.sessions import SessionPool

from .answer import Answer, Stopped
from .events import Event, Progress, Stored
from .prompt import SPLICE, Prompt, forget, prepare, remembered
from .settings import Settings
from .thinking import marks_of
from .tree import Conversation, Cost, Message, Replied
from .watch import Watch

REPETITIONS = 64
"""The number of newest tokens to which the penalty for repetitions applies."""

STEP = 128
"""The block size of the prefill, in tokens: it can be stopped between blocks."""


@dataclass
class Engine:
    """A model and its caches. Use it in one thread only.

    Args:
        folder: the folder for caches that are evicted, and for all caches at `close`; None saves none.
        clock: returns the time in seconds, for speeds.

    Attributes:
        notice: a warning if the folder cannot be used; "" otherwise.
    """

    model: Any
    tokenizer: Any
    settings: Settings
    folder: Path | None = None
    clock: Callable[[], float] = time.perf_counter
    notice: str = field(default="", init=False)
    _surveyed: tuple[int, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _set_window(self.model, self.settings)
        try:
            self.pool = self._pool(self.folder)
        except CacheFileError as error:
            self.pool = self._pool(None)
            self.notice = f"Caches are not kept: {error}"
        self.watch = Watch(self.pool, self.settings.capacity, self.clock)
        self.reader = fingerprint(self.model, self.tokenizer)["tokenizer"]
        self.marks = marks_of(self.tokenizer)

    def reply(
        self,
        conversation: Conversation,
        last: Message,
        name: str,
        emit: Callable[[Event], None] = lambda event: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Replied:
        """Generate the reply to a user's message, or continue a reply.

        Args:
            last: the message, or a reply that was cut.
            name: the id of the reply's message.
            emit: receives events during the reply, but not its end.
            is_stopped: called at every token; a true result stops the reply.

        Raises:
            TooLong: the message does not fit; nothing has changed.
            CacheError: a cache failed; the conversation is unchanged.
        """
        conversation.read_by(self.reader)
        path = conversation.path_to(last.id)
        begin = self.clock()
        prompt = prepare(self.pool, self.tokenizer, conversation, path, name, self.settings)
        start = prompt.start
        answer = Answer(prompt, emit, is_stopped, self.clock, begin)
        if last.role == "assistant":
            start = path[-2].start
            answer.go_on(last)
        self.watch.follow(conversation.id, prompt.session, prompt.gap)
        self._tell(answer)
        try:
            self._generate(answer, name)
        except Stopped:
            answer.ended = "stopped"
        finally:
            prompt.session.close()
        answer.tell()
        cost = self._cost(answer)
        self.watch.add(cost)
        self._tell(answer)
        return Replied(answer.text, answer.piece, prompt.read, (start, prompt.start), cost, answer.ended)

    def warm(self, conversation: Conversation, emit: Callable[[Event], None]) -> None:
        """Load the current branch's cache into memory, if one is stored."""
        conversation.read_by(self.reader)
        path = conversation.path
        if path:
            context, tokens = remembered(self.tokenizer, conversation)
            gap = len(context.opening.tokens) if path[-1].start else None
            # `open` leaves at least one token to compute; the extra token lets it reuse all others.
            splice = SPLICE if context.is_changed else 0
            with self.pool.open([*tokens, 0], conversation.salt(path), splice=splice) as session:
                self.watch.follow(conversation.id, session, gap)
        else:
            self.watch.forget()
        self.look(emit)

    def survey(self, conversations: Sequence[Conversation], emit: Callable[[Event], None]) -> None:
        """Report how much of each conversation is on disk, if that has changed."""
        counts = self.pool.counts.to_disk, self.pool.counts.from_disk
        if self.folder is None or counts == self._surveyed:
            return
        self._surveyed = counts
        stored = {}
        for conversation in conversations:
            if conversation.path and conversation.reader == self.reader:
                _, tokens = remembered(self.tokenizer, conversation)
                stored[conversation.id] = self.pool.on_disk(tokens, conversation.salt(conversation.path))
        emit(Stored({name: tokens for name, tokens in stored.items() if tokens}))

    def look(self, emit: Callable[[Event], None]) -> None:
        """Report what the caches hold."""
        emit(self.watch.seen())

    def close(self) -> None:
        """Write all caches to the folder, if there is one, and close them."""
        self.pool.close()

    def _pool(self, folder: Path | None) -> SessionPool:
        chosen = self.settings
        if folder is not None and chosen.window:
            folder = folder / f"window-{chosen.window}-{chosen.sinks}"
        return make_session_pool(
            self.model,
            max_bytes=chosen.memory * 10**6,
            folder=folder,
            tokenizer=self.tokenizer,
            capacity=chosen.capacity,
            kv_bits=chosen.bits,
        )

    def _generate(self, answer: Answer, name: str) -> None:
        prompt, settings = answer.prompt, self.settings
        if settings.seed is not None:
            mx.random.seed(settings.seed)
        penalty = settings.repetition_penalty if settings.repetition_penalty != 1 else None

        def progress(done: int, total: int) -> None:
            answer.progress(done, total)
            if self.watch.is_due():
                self._tell(answer)

        parts = stream_generate(
            self.model,
            self.tokenizer,
            prompt.session.rest,
            max_tokens=settings.max_tokens,
            prompt_cache=prompt.session.cache,
            sampler=make_sampler(settings.temperature, settings.top_p, settings.min_p),
            logits_processors=make_logits_processors(None, penalty, REPETITIONS),
            prefill_step_size=STEP,
            prompt_progress_callback=progress,
        )
        with closing(parts):
            for part in parts:
                prompt.session.extend([part.token])
                answer.add(part, self.tokenizer)
                forgotten = prompt.forgotten
                if part.finish_reason is None and not self._make_room(prompt, name):
                    answer.ended = "capacity"
                    return
                if self.watch.is_due() or answer.generated == 1 or prompt.forgotten != forgotten:
                    self._tell(answer)

    def _make_room(self, prompt: Prompt, name: str) -> bool:
        """Make room for a token, forgetting the oldest turn if necessary. Returns whether there is room."""
        capacity = self.settings.capacity
        if capacity is None or prompt.session.cache.position < capacity:
            return True
        if not forget(prompt, name):
            return False
        self.watch.move(prompt.gap)
        return True

    def _tell(self, answer: Answer) -> None:
        """Report how far a reply is, and what the caches hold."""
        answer.emit(Progress(self._cost(answer), answer.prompt.start))
        self.look(answer.emit)

    def _cost(self, answer: Answer) -> Cost:
        until_first = (answer.first if answer.generated else self.clock()) - answer.begin
        return Cost(
            reused=answer.reused,
            prefilled=answer.read,
            generated=answer.generated,
            forgotten=answer.prompt.forgotten,
            first_token=until_first,
            seconds=answer.last - answer.first,
            saved=self.watch.saved(answer.reused, answer.read, until_first),
        )


def _set_window(model: Any, settings: Settings) -> None:
    """Apply the window setting: replace the model's `KVCache` layers by `RotatingKVCache`."""
    vars(model).pop("make_cache", None)
    if settings.window is None:
        return
    own = getattr(model, "make_cache", lambda: [KVCache() for _ in model.layers])
    size, sinks = settings.window + settings.sinks, settings.sinks

    def make_cache() -> list[Any]:
        return [RotatingKVCache(size, keep=sinks) if type(entry) is KVCache else entry for entry in own()]

    model.make_cache = make_cache
