"""Generating for many sequences at once, which come and go at any step.

Each step is one call of the model: a token of every sequence that is generating, and as many
tokens of waiting prompts as fit beside them. So a long prompt never holds the others up for
longer than a step. ("Sarathi-Serve", arXiv 2403.02310, on engines in general.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice, repeat
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ...arguments import class_of, token_ids, whole
from ...errors import CacheError, CacheFullError, NotSupportedError
from ..entries.nested import entries_of
from ..forward.rows import TokenRows
from ..hosts.layout import logits_of
from ..options import check_options, reusable
from ..prompt_cache import PromptCache, make_prompt_cache
from ..ranks import ranks_of

Sampler = Callable[[mx.array], mx.array]
"""Log probabilities (1, vocabulary) -> a token (1,), as mlx-lm's samplers."""

Finish = Literal["stop", "length", "cancelled", "full", "closed", "interrupted"]


class Generated(NamedTuple):
    """A token of a sequence; the last one says why it is the last.

    Attributes:
        ticket: what `Many.add` gave.
        token: None where the sequence ends without one.
        finish: None while it goes on; "full" where its cache has no room, "closed" where it was
            closed by somebody, "interrupted" where an exception left a cache that cannot go back.
        error: what was raised, where something was.
    """

    ticket: int
    token: int | None
    finish: Finish | None = None
    error: CacheError | None = None


@dataclass(frozen=True)
class _Sequence:
    cache: PromptCache
    waiting: list[int]
    left: int
    sampler: Sampler
    stop: frozenset[int]
    pending: list[int] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The longest block that its cache can ever take at once, if it makes room for it."""
        capacity, overflow, sinks, _ = self.cache._conversation.limits
        return sys.maxsize if capacity is None or overflow == "error" else capacity - sinks


class Many:
    """A running set of sequences of one model.

    Args:
        model: an mlx-lm model.
        tokens_per_step: the most tokens in one call of the model.
        options: of `make_prompt_cache`, for sequences that bring no cache.

    Raises:
        ValueError: tokens_per_step below 1.
        TypeError, NotSupportedError: as `make_prompt_cache`.
    """

    def __init__(self, model: nn.Module, tokens_per_step: int = 128, **options: Any) -> None:
        check_options(options, "Many", ("tokens_per_step",))
        (self._most,) = whole(1, tokens_per_step=tokens_per_step)
        if not ranks_of(options.get("group")).is_alone:
            raise NotSupportedError("sequences that come and go are not agreed on by the ranks of a group")
        self._model = model
        self._options = options = reusable(options)
        self._tickets = count()
        self._sequences: dict[int, _Sequence] = {}
        self._ended: list[Generated] = []
        first = make_prompt_cache(model, **options)
        # Kept, so that what is made later is made in the same pool.
        self._pool = first.pool
        # The width of logits, which need not be computed for that.
        self._vocabulary = logits_of(model, mx.zeros((1, 1), mx.int32), first).shape[-1]

    def __len__(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    def __repr__(self) -> str:
        n, module = len(self), type(self._model).__module__.rpartition(".")[2]
        return f"Many({n} sequence{'s' * (n != 1)}, tokens_per_step={self._most}, {module})"

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        cache: PromptCache | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Iterable[int] = (),
    ) -> int:
        """Let a sequence join at the next step.

        Args:
            prompt: its tokens, those in `cache` left out.
            max_tokens: how many to generate at most.
            cache: a prompt cache of this model to go on with; None makes one.
            sampler: None takes the likeliest token.
            stop_tokens: tokens after which it ends.

        Returns:
            A ticket, which names it.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, max_tokens below 1, or
                a cache of another pool.
            TypeError: a prompt that is no sequence of whole numbers, such as a text, or a cache of another
                class.
            CacheError: the cache is in use here already, or closed.
        """
        tokens = token_ids(prompt, "prompt")
        if not tokens:
            raise ValueError("the prompt is empty: at least 1 token is needed")
        outside = [token for token in tokens if not 0 <= token < self._vocabulary]
        if outside:
            raise ValueError(f"token {outside[0]} is outside the vocabulary of {self._vocabulary}")
        (max_tokens,) = whole(1, max_tokens=max_tokens)
        if cache is None:
            cache = make_prompt_cache(self._model, **self._options)
        if not isinstance(cache, PromptCache):
            raise TypeError(f"cache must be of make_prompt_cache, got {class_of(cache)}")
        if cache.pool is not self._pool:
            raise ValueError("the cache is of another pool: another model, or made with other options")
        if any(cache is own.cache for own in self._sequences.values()):
            raise CacheError("the cache is in use by another sequence; fork it")
        cache.position  # noqa: B018  # raises where it is closed
        stop = frozenset(token_ids(stop_tokens, "stop_tokens"))
        if sampler is not None and not callable(sampler):
            raise TypeError(f"sampler must be a function of log probabilities, got {class_of(sampler)}")
        ticket = next(self._tickets)
        self._sequences[ticket] = _Sequence(
            cache, tokens, max_tokens, sampler or partial(mx.argmax, axis=-1), stop
        )
        return ticket

    def cancel(self, ticket: int) -> PromptCache:
        """End a sequence before its time, and return its cache. Raises ValueError for an unknown one."""
        if ticket not in self._sequences:
            raise ValueError(f"no sequence {ticket} is running; there are {sorted(self._sequences)}")
        cache = self._sequences[ticket].cache
        self._end(Generated(ticket, None, "cancelled"))
        return cache

    def step(self) -> list[Generated]:
        """One call of the model: what it gives, and what has ended since the last one.

        Where the model or a sampler raises, the tokens of this step wait for the next one. A
        sequence whose cache cannot go back by them ends.
        """
        chosen = self._chosen()
        begins = {ticket: self._sequences[ticket].cache.position for ticket in chosen}
        try:
            after, results = self._computed(chosen)
            self._sequences, self._ended = after, [*self._ended, *results]
        except BaseException as error:
            self._take_back(begins, error)
            raise
        # In one line, so that what is interrupted before it gives them with the next step.
        return list(map(self._ended.pop, repeat(0, len(self._ended))))

    def _chosen(self) -> dict[int, list[int]]:
        """The next tokens of each sequence: one of those that generate, then blocks of prompts.

        Where there is no room for one of each, all are served in turn.
        """
        chosen: dict[int, list[int]] = {}
        room = self._most
        generating = [t for t, s in self._sequences.items() if s.pending]
        starting = sorted(t for t, s in self._sequences.items() if s.waiting)
        # Where not all find room, those come first that have waited longest.
        order = list(self._sequences) if len(generating) >= room else [*generating, *starting]
        for ticket in order:
            sequence = self._sequences[ticket]
            tokens = (sequence.pending or sequence.waiting)[: min(room, sequence.most)]
            if not tokens:
                continue
            try:
                if sequence.cache.pool is not self._pool:
                    raise CacheError("the cache is of another pool since it was added")
                with sequence.cache._rows.edit(f"make room for {len(tokens)} tokens"):
                    sequence.cache._conversation.make_room(len(tokens), early=True)
            except CacheError as error:
                finish: Finish = "full" if isinstance(error, CacheFullError) else "closed"
                self._end(Generated(ticket, None, finish, error))
                continue
            chosen[ticket] = tokens
            room -= len(tokens)
        return chosen

    def _computed(self, chosen: dict[int, list[int]]) -> tuple[dict[int, _Sequence], list[Generated]]:
        """The model's call: the sequences after it, and a token for each that has read all it had."""
        # Those that are served go behind the others.
        waiting_ones = {t: s for t, s in self._sequences.items() if t not in chosen}
        after, results = {**waiting_ones, **self._sequences}, list[Generated]()
        for ticket, tokens in chosen.items():
            sequence = after[ticket]
            waiting = sequence.waiting if sequence.pending else sequence.waiting[len(tokens) :]
            after[ticket] = replace(sequence, waiting=waiting, pending=[])
        logits = dict(self._logits(chosen)) if chosen else {}
        ready = {ticket: own for ticket, own in logits.items() if not after[ticket].waiting}
        if len(ready) < len(chosen):
            # Blocks of prompts are not part of anybody's logits yet.
            mx.eval(list(ready.values()))
        for ticket, own in ready.items():
            generated = _sampled(ticket, after[ticket], own)
            results.append(generated)
            if generated.finish:
                del after[ticket]
            else:
                assert generated.token is not None
                left = after[ticket].left - 1
                after[ticket] = replace(after[ticket], pending=[generated.token], left=left)
        return after, results

    def _take_back(self, begins: dict[int, int], error: BaseException) -> None:
        """Let caches go back to where they were before a step."""
        for ticket, begin in begins.items():
            cache = self._sequences[ticket].cache
            try:
                cache.rewind_to(begin)
            except CacheError as refusal:
                refusal.__cause__ = error
                self._end(Generated(ticket, None, "interrupted", refusal))

    def _end(self, last: Generated) -> None:
        others = {ticket: own for ticket, own in self._sequences.items() if ticket != last.ticket}
        self._sequences, self._ended = others, [*self._ended, last]

    def _logits(self, chosen: dict[int, list[int]]) -> Iterator[tuple[int, mx.array]]:
        """For each sequence the logits (1, vocabulary) after its last token."""
        if not self._pool.mixes:
            for ticket, tokens in chosen.items():
                cache = self._sequences[ticket].cache
                yield ticket, logits_of(self._model, mx.array([tokens]), cache)[:, -1]
            return
        conversations = [self._sequences[ticket].cache._conversation for ticket in chosen]
        counts = [len(tokens) for tokens in chosen.values()]
        entries = entries_of(TokenRows(self._pool, conversations, counts))
        rows = mx.array([[token] for tokens in chosen.values() for token in tokens])
        logits = logits_of(self._model, rows, entries)
        last = -1
        for ticket, tokens in chosen.items():
            last += len(tokens)
            yield ticket, logits[last]


def _sampled(ticket: int, sequence: _Sequence, logits: mx.array) -> Generated:
    """A sequence's next token by logits (1, vocabulary)."""
    logits = logits.astype(mx.float32)
    drawn: Any = sequence.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item()
    token = int(drawn)
    finish: Finish | None = None
    if token in sequence.stop:
        finish = "stop"
    elif sequence.left == 1:
        finish = "length"
    return Generated(ticket, token, finish)


_OWN = ("max_tokens", "stop_tokens", "tokens_per_step", "most_at_once", "progress")


def generate_many(
    model: nn.Module,
    prompts: Iterable[Sequence[int]],
    max_tokens: int = 256,
    stop_tokens: Iterable[int] = (),
    tokens_per_step: int = 128,
    most_at_once: int = 32,
    progress: bool = False,
    **options: Any,
) -> Iterator[Generated]:
    """Generate for many prompts, and give each token as it comes.

    Args:
        prompts: lists of tokens; taken from the iterable as sequences end. A ticket is a
            prompt's place in it.
        max_tokens, stop_tokens: as of `Many.add`, for all.
        tokens_per_step: the most tokens in one call of the model.
        most_at_once: the most sequences that run at the same time.
        progress: show how many prompts are done.
        options: of `make_prompt_cache`.

    Raises:
        ValueError: as `Many` and `Many.add`, or most_at_once below 1.
        TypeError: as `Many` and `Many.add`, or one text in place of prompts.
    """
    check_options(options, "generate_many", _OWN)
    if isinstance(prompts, str):
        token_ids(prompts, "prompts")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be lists of tokens, got {class_of(prompts)}")
    whole(1, most_at_once=most_at_once, max_tokens=max_tokens)
    many, stop = Many(model, tokens_per_step, **options), token_ids(stop_tokens, "stop_tokens")

    def generated() -> Iterator[Generated]:
        waiting = iter(prompts)
        with tqdm(unit="prompt", disable=not progress) as bar:
            while True:
                for prompt in islice(waiting, most_at_once - len(many)):
                    many.add(prompt, max_tokens, stop_tokens=stop)
                if not len(many):
                    return
                for one in many.step():
                    bar.update(one.finish is not None)
                    yield one

    return generated()
