"""Continuous batching: generates for many sequences, which can join and leave at every step.

Each step calls the model once, with one token of every generating sequence and with as many prompt tokens
as fit into the rest of the step. A long prompt is thus read in chunks and delays the other sequences by one
step at a time (chunked prefill, "Sarathi-Serve", arXiv 2403.02310).

A step starts the call of the model for the next one before it waits for its own tokens: the arrays that
compute them are the next input. So the device computes while Python prepares, as in mlx-lm's `generate_step`.
The token after a stop token is computed in vain, and rolled back.

With `draft_tokens`, the rest of a step also tries tokens that are likely to come next. One call then checks
them all, and the cache rolls back those that are not what the sampler chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice, repeat
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ...arguments import class_of, token_ids, whole
from ...errors import CacheError, CacheFullError, NotSupportedError
from ..cache_options import check_options, reusable
from ..entries.nested import entries_of
from ..forward.token_rows import TokenRows
from ..hosts.host import logits_of, name_of
from ..hosts.layout import language_model_of
from ..pool.pool import Pool
from ..prompt_cache import PromptCache, make_prompt_cache
from ..ranks import ranks_of
from .next_tokens import Drafter, Drawn, Sampler, greedy

Finish = Literal["stop", "length", "cancelled", "full", "closed", "interrupted"]

UNKNOWN = -1
"""Stands for a token that the step before computes."""


class Generated(NamedTuple):
    """A generated token, or the end of a sequence.

    Attributes:
        ticket: the sequence, as returned by `Many.add`.
        token: the token; None if the sequence ended without one.
        finish: why the sequence ended; None while it runs. "stop": a stop token; "length": max_tokens
            reached; "cancelled": `Many.cancel`; "full": the cache has no room; "closed": the cache was
            closed or moved to another pool; "interrupted": an exception interrupted a step and the cache
            cannot roll back.
        error: the exception that ended the sequence, or None.
    """

    ticket: int
    token: int | None
    finish: Finish | None = None
    error: CacheError | None = None


@dataclass(frozen=True)
class _Sequence:
    """A running sequence: `tokens` are those to compute next, the rest of the prompt or a generated one."""

    cache: PromptCache
    tokens: list[int]
    left: int
    sampler: Sampler
    stop: frozenset[int]
    drafter: Drafter | None = None
    is_generating: bool = False

    def room_ahead(self, position: int) -> int:
        """How many tokens after the pending one, which comes to `position`, the cache can take and roll back.

        It takes none that would make it shift or quantize before plain decoding does.
        """
        [conversation] = self.cache._rows.conversations
        limits, quantization = conversation.limits, conversation.pool.quantization
        # `rewind` tokens can always be dropped. One of them is the pending token, for when a step raises.
        room = limits.rewind - 1
        for border in (limits.capacity, quantization.after if quantization else None):
            if border is not None and position < border:
                room = min(room, border - position - 1)
        return room

    def can_take_ahead(self, pool: Pool, begin: int, position: int) -> bool:
        """Whether its cache can take the two tokens from `begin` on and drop them again.

        A user may have changed or closed the cache, which should be in this pool and at this position.
        """
        rows = self.cache._rows
        [conversation] = rows.conversations
        if rows.pool is not pool or conversation.waiting or self.room_ahead(begin) < 1:
            return False
        try:
            return conversation.position == position
        except CacheError:
            return False

    @property
    def most(self) -> int:
        """The longest block that the cache can take at once after making room."""
        [conversation] = self.cache._rows.conversations
        capacity, overflow, sinks, *_ = conversation.limits
        return sys.maxsize if capacity is None or overflow == "error" else capacity - sinks

    def draft(self, most: int) -> list[int]:
        """Draft at most `most` tokens that come after the pending one and that the cache can roll back."""
        if self.drafter is None:
            return []
        most = min(most, self.room_ahead(self.cache.position), self.left - 1)
        return self.drafter.draft(most) if most > 0 else []


class _Block(NamedTuple):
    """The tokens of one sequence in a step, of which the last ones may be drafts."""

    tokens: list[int]
    drafts: Sequence[int] = ()


@dataclass
class _Step:
    """A call of the model, and the tokens that follow it.

    Attributes:
        blocks: the tokens of each sequence that it serves.
        begins: the position of each one's cache before it.
        ready: the tickets whose prompt is read after it, so that they get a token.
        drawn: their tokens, once the model has been called.
    """

    blocks: Mapping[int, _Block]
    begins: Mapping[int, int]
    ready: Set[int]
    drawn: Drawn | None = None


class Many:
    """Generates for a changing set of sequences of one model (continuous batching).

    Args:
        model: a model of mlx-lm or mlx-vlm.
        tokens_per_step: the maximum number of tokens in one call of the model.
        draft_tokens: the maximum number of tokens to draft for a sequence in each step: those that followed
            its 3 or 2 newest tokens where they occurred before, in its prompt or reply. They fill what
            prompts leave of `tokens_per_step`. 0 drafts nothing. At most `rewind` - 1 tokens are drafted,
            and none for models whose recurrent layers go back to checkpoints only.
        options: options of `make_prompt_cache`, for sequences added without a cache.

    Attributes:
        drafted: the number of tokens that were drafted.
        accepted: the number of those that became tokens of a reply.

    Raises:
        ValueError: tokens_per_step is below 1, or draft_tokens below 0.
        TypeError, NotSupportedError: as `make_prompt_cache`, or the group has several ranks.
    """

    def __init__(
        self, model: nn.Module, tokens_per_step: int = 128, draft_tokens: int = 0, **options: Any
    ) -> None:
        check_options(options, "Many", ("tokens_per_step", "draft_tokens"))
        (self._most,) = whole(1, tokens_per_step=tokens_per_step)
        (self._most_drafted,) = whole(draft_tokens=draft_tokens)
        if not ranks_of(options.get("group")).is_alone:
            raise NotSupportedError(
                "Many does not support ranks: they do not agree on which sequences join and leave; "
                "pass no group, or generate with make_prompt_cache(group=...)"
            )
        self._model = language_model_of(model)
        self._options = reusable(options)
        self._tickets = count()
        self._sequences: dict[int, _Sequence] = {}
        self._ended: list[Generated] = []
        self._under_way: _Step | None = None
        """A step for which the model has been called and whose tokens no step has returned."""
        self._is_careful = False
        """Whether the last step raised, so that the next one starts none ahead."""
        self._entries: list[Any] | None = None
        """The cache list of the last step, if each sequence had one token in it and none has ended since."""
        first = make_prompt_cache(model, **self._options)
        # A reference to the pool, so that later caches are made in it.
        self._pool = first.pool
        # The shape is known without evaluating the logits.
        self._vocabulary = logits_of(model, mx.zeros((1, 1), mx.int32), first).shape[-1]
        self._goes_back = not self._pool.layout.is_recurrent or bool(self._pool.mixers)
        if not self._goes_back:
            self._most_drafted = 0
        self.drafted = self.accepted = 0

    def __len__(self) -> int:
        """The number of running sequences."""
        return len(self._sequences)

    def __repr__(self) -> str:
        n, module = len(self), name_of(type(self._model).__module__)
        return f"Many({n} sequence{'s' * (n != 1)}, tokens_per_step={self._most}, {module})"

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        cache: PromptCache | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Iterable[int] = (),
    ) -> int:
        """Add a sequence, which joins at the next step.

        Args:
            prompt: its tokens, without those that `cache` already holds.
            max_tokens: the maximum number of tokens to generate.
            cache: a prompt cache of this model to continue; None makes a new one.
            sampler: chooses the next token; None takes the likeliest. It is called for a token before the
                token in front of it is known to end the reply; that token is then dropped.
            stop_tokens: tokens that end the sequence.

        Returns:
            A ticket that identifies the sequence in `step` and `cancel`.

        Raises:
            ValueError: the prompt is empty, a token is outside the vocabulary, max_tokens is below 1, or
                the cache belongs to another pool.
            TypeError: the prompt is not a sequence of integers, or the cache is not a `PromptCache`.
            CacheError: the cache is closed, or a sequence added before uses it.
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
            raise TypeError(f"cache must be a PromptCache (see make_prompt_cache), got {class_of(cache)}")
        if cache.pool is not self._pool:
            raise ValueError(
                "the cache belongs to another pool: it was made for another model or with other options"
            )
        if any(cache is own.cache for own in self._sequences.values()):
            raise CacheError("the cache is in use by another sequence; pass cache.fork()")
        cache.position  # noqa: B018  # raises if the cache is closed
        stop = frozenset(token_ids(stop_tokens, "stop_tokens"))
        if sampler is not None and not callable(sampler):
            raise TypeError(
                f"sampler must be a function (log probabilities -> token), got {class_of(sampler)}"
            )
        ticket = next(self._tickets)
        drafter = Drafter(tokens) if self._most_drafted else None
        self._sequences[ticket] = _Sequence(cache, tokens, max_tokens, sampler or greedy, stop, drafter)
        return ticket

    def cancel(self, ticket: int) -> PromptCache:
        """End a sequence early and return its cache, which holds all but the newest of its tokens.

        Raises:
            ValueError: the ticket's sequence is not running.
        """
        sequence = self._sequences.get(ticket)
        if sequence is None:
            raise ValueError(f"no sequence {ticket} is running; running: {sorted(self._sequences)}")
        step = self._under_way
        if step and ticket in step.blocks and sequence.is_generating:
            # The step under way has put its newest token there already.
            with suppress(CacheError):
                sequence.cache.rewind_to(step.begins[ticket])
        self._end(Generated(ticket, None, "cancelled"))
        return sequence.cache

    def step(self) -> list[Generated]:
        """Return the next tokens, and start the call of the model after them.

        If the model or a sampler raises, the caches roll back and the next step repeats the tokens that this
        one lacks. A sequence whose cache cannot roll back ends ("interrupted").

        Returns:
            The tokens of this step, and the sequences that have ended since the last one.
        """
        step = self._under_way
        if step is None or step.blocks.keys().isdisjoint(self._sequences):
            step = self._choose(self._sequences)
        ahead = self._choose_ahead(step)
        try:
            if step is not self._under_way:
                self._call(step)
                self._under_way = step
            if ahead is not None:
                self._call(ahead, step)
            # From here on, an exception undoes this step, too.
            self._under_way = None
            after, new = self._delivered(step, ahead)
            results = [result for own in new.values() for result in own]
            if len(after) < len(self._sequences):
                # It would keep the conversations of sequences that have ended.
                self._entries = None
            self._is_careful = False
            self._sequences, self._ended, self._under_way = after, [*self._ended, *results], ahead
        except BaseException as error:
            begins = dict(ahead.begins) if ahead else {}
            if self._under_way is not step:
                self._under_way = None
                begins |= step.begins
            self._is_careful = True
            self._roll_back(begins, error)
            raise
        if self._most_drafted:
            self._learn(step, new)
        # In one line: if an exception comes before it, the next step returns these results.
        return list(map(self._ended.pop, repeat(0, len(self._ended))))

    def _choose(
        self, sequences: Mapping[int, _Sequence], begins: Mapping[int, int] = MappingProxyType({})
    ) -> _Step:
        """Choose the tokens of the next step: one of each generating sequence, then blocks of prompts.

        If `tokens_per_step` or more sequences are generating, all sequences take turns. Drafts share what is
        left, so that no sequence waits for them.

        Args:
            sequences: in the order of service: those that have waited longest come first.
            begins: the positions of caches that will have changed before the step.
        """
        blocks: dict[int, _Block] = {}
        room = self._most
        generating = [t for t, s in sequences.items() if s.is_generating]
        starting = sorted(sequences.keys() - set(generating))
        for ticket in list(sequences) if len(generating) >= room else [*generating, *starting]:
            sequence = sequences[ticket]
            tokens = sequence.tokens[: min(room, sequence.most)]
            if not tokens:
                continue
            if ticket not in begins:
                try:
                    tokens = self._with_room(sequence.cache, tokens)
                except CacheError as error:
                    finish: Finish = "full" if isinstance(error, CacheFullError) else "closed"
                    self._end(Generated(ticket, None, finish, error))
                    continue
            blocks[ticket] = _Block(tokens)
            room -= len(tokens)
        drafting = [ticket for ticket in blocks if self._most_drafted and sequences[ticket].is_generating]
        for sharing, ticket in zip(range(len(drafting), 0, -1), drafting, strict=True):
            drafts = sequences[ticket].draft(min(self._most_drafted, room // sharing))
            blocks[ticket] = _Block([*blocks[ticket].tokens, *drafts], drafts)
            room -= len(drafts)
        at = {t: begins[t] if t in begins else sequences[t].cache.position for t in blocks}
        ready = {t for t, block in blocks.items() if len(block.tokens) >= len(sequences[t].tokens)}
        return _Step(blocks, at, ready)

    def _with_room(self, cache: PromptCache, tokens: list[int]) -> list[int]:
        """Make room for tokens, or for those of them after which others join. Raises CacheError."""
        if cache.pool is not self._pool:
            raise CacheError("the cache has moved to another pool since it was added")
        conversation = cache._conversation
        conversation.check_open()
        if conversation.waiting or not conversation.has_room(len(tokens)):
            with cache._rows.edit(f"make room for {len(tokens)} tokens"):
                conversation.join_waiting(early=True)
                tokens = tokens[: min(conversation.edges(len(tokens)), default=len(tokens))]
                conversation.make_room(len(tokens), early=True)
        return tokens

    def _choose_ahead(self, step: _Step) -> _Step | None:
        """The step after one whose tokens need not be known yet. None if they must be."""
        if self._is_careful or self._most_drafted or not self._goes_back or self._pool.is_shared:
            return None
        called = step is self._under_way
        after = {t: own for t, own in self._sequences.items() if t not in step.blocks}
        begins = {}
        for ticket in step.blocks:
            sequence = self._sequences.get(ticket)
            if sequence is None:
                continue
            if not sequence.is_generating:
                return None
            if sequence.left > 1:
                begin = step.begins[ticket]
                if not sequence.can_take_ahead(self._pool, begin, begin + called):
                    return None
                begins[ticket] = begin + 1
                after[ticket] = replace(sequence, tokens=[UNKNOWN], left=sequence.left - 1)
        ahead = self._choose(after, begins) if begins else None
        return ahead if ahead and ahead.blocks else None

    def _call(self, step: _Step, before: _Step | None = None) -> None:
        """Call the model and the samplers, without waiting for what they compute.

        Args:
            before: the step whose tokens take the place of those that are `UNKNOWN`.
        """
        if not step.blocks:
            return
        logits = self._logits(step, _inputs(step, before))
        ends = accumulate(len(block.tokens) for block in step.blocks.values())
        given = {
            ticket: (self._sequences[ticket].sampler, range(end - 1 - len(block.drafts), end))
            for (ticket, block), end in zip(step.blocks.items(), ends, strict=True)
            if ticket in step.ready
        }
        step.drawn = Drawn(logits, given)
        # Sequences that still read their prompt are part of the same computation.
        mx.async_eval(logits, step.drawn.tokens)  # type: ignore[no-untyped-call]

    def _logits(self, step: _Step, inputs: mx.array) -> mx.array:
        """The logits (tokens, vocabulary) after each token of a step."""
        counts = [len(block.tokens) for block in step.blocks.values()]
        caches = [self._sequences[ticket].cache for ticket in step.blocks]
        if not self._pool.mixes or len(caches) == 1:
            pieces = mx.split(inputs, list(accumulate(counts))[:-1])
            every = [
                logits_of(self._model, own[None], cache)[0] for own, cache in zip(pieces, caches, strict=True)
            ]
            return mx.concatenate(every)
        conversations = [cache._rows.conversation for cache in caches]
        entries, self._entries, is_decoding = self._entries, None, len(inputs) == len(counts)
        if entries is None or not is_decoding or entries[0].rows.conversations != conversations:
            entries = entries_of(TokenRows(self._pool, conversations, counts))
        logits = logits_of(self._model, inputs[:, None], entries)[:, 0]
        if is_decoding:
            self._entries = entries
        return logits

    def _delivered(
        self, step: _Step, ahead: _Step | None
    ) -> tuple[dict[int, _Sequence], dict[int, list[Generated]]]:
        """Wait for a step. Returns the sequences after it, and the tokens of those whose prompt is read.

        Args:
            ahead: the step after it, if the model has been called for it. Sequences that end leave it.
        """
        # The sequences served in this step move behind the others.
        unserved = {t: s for t, s in self._sequences.items() if t not in step.blocks}
        after, new = {**unserved, **self._sequences}, dict[int, list[Generated]]()
        drawn = step.drawn.numbers() if step.drawn else {}
        for ticket, block in step.blocks.items():
            sequence = after.get(ticket)
            if sequence is None:
                continue
            if ticket not in step.ready:
                after[ticket] = replace(sequence, tokens=sequence.tokens[len(block.tokens) :])
                continue
            results = new[ticket] = _generated(ticket, sequence, block.drafts, drawn[ticket])
            last = results[-1]
            ends = last.finish is not None
            if len(results) <= len(block.drafts) or (ends and ahead and ticket in ahead.blocks):
                kept = step.begins[ticket] + len(block.tokens) - len(block.drafts) + len(results) - 1
                try:
                    sequence.cache.rewind_to(kept)
                except CacheError as error:
                    results[-1] = last._replace(finish=last.finish or "closed", error=error)
                    ends = True
            if ends or last.token is None:
                del after[ticket]
            else:
                left = sequence.left - len(results)
                after[ticket] = replace(sequence, tokens=[last.token], left=left, is_generating=True)
        return after, new

    def _learn(self, step: _Step, new: dict[int, list[Generated]]) -> None:
        """Count drafted and accepted tokens, and tell the drafters."""
        for ticket, results in new.items():
            tokens = [result.token for result in results if result.token is not None]
            drafts, sequence = step.blocks[ticket].drafts, self._sequences.get(ticket)
            accepted = sum(a == b for a, b in zip(drafts, tokens, strict=False))
            self.drafted += len(drafts)
            self.accepted += accepted
            if sequence and sequence.drafter:
                sequence.drafter.learn(tokens, len(drafts), accepted)

    def _roll_back(self, begins: Mapping[int, int], error: BaseException) -> None:
        """Take the tokens of failed steps out of the caches."""
        for ticket, begin in begins.items():
            sequence = self._sequences.get(ticket)
            if sequence is not None:
                try:
                    sequence.cache.rewind_to(begin)
                except CacheError as refusal:
                    refusal.__cause__ = error
                    self._end(Generated(ticket, None, "interrupted", refusal))

    def _end(self, last: Generated) -> None:
        others = {ticket: own for ticket, own in self._sequences.items() if ticket != last.ticket}
        self._sequences, self._ended, self._entries = others, [*self._ended, last], None


def _generated(
    ticket: int, sequence: _Sequence, drafts: Sequence[int], sampled: Iterable[int]
) -> list[Generated]:
    """The next tokens: the drafts, as long as the sampler chooses them, and one more.

    Args:
        sampled: what the sampler chooses after the last token and after each draft.
    """
    results: list[Generated] = []
    for token, draft in zip(sampled, [*drafts, None], strict=True):
        finish: Finish | None = "length" if sequence.left == len(results) + 1 else None
        if token in sequence.stop:
            finish = "stop"
        results.append(Generated(ticket, token, finish))
        if finish or token != draft:
            break
    return results


def _inputs(step: _Step, before: _Step | None) -> mx.array:
    """The tokens of a step, of which some may still be computed by the step before."""
    tokens = [token for block in step.blocks.values() for token in block.tokens]
    if before is None or before.drawn is None:
        return mx.array(tokens)
    drawn, places = before.drawn.tokens, before.drawn.places
    if tokens == [UNKNOWN] * drawn.size and list(step.blocks) == list(places):
        return drawn
    known = [token for token in tokens if token != UNKNOWN]
    others = iter(range(drawn.size, drawn.size + len(known)))
    chosen = [
        places[ticket] if token == UNKNOWN else next(others)
        for ticket, block in step.blocks.items()
        for token in block.tokens
    ]
    return mx.concatenate([drawn, mx.array(known, drawn.dtype)])[mx.array(chosen)]


def generate_many(
    model: nn.Module,
    prompts: Iterable[Sequence[int]],
    max_tokens: int = 256,
    stop_tokens: Iterable[int] = (),
    tokens_per_step: int = 128,
    most_at_once: int = 32,
    progress: bool = False,
    draft_tokens: int = 0,
    **options: Any,
) -> Iterator[Generated]:
    """Generate for many prompts with continuous batching.

    Args:
        prompts: lists of tokens, taken from the iterable as running sequences end. A sequence's ticket is
            the index of its prompt.
        max_tokens, stop_tokens: as in `Many.add`, for all prompts.
        tokens_per_step: the maximum number of tokens in one call of the model.
        most_at_once: the maximum number of sequences that run at the same time.
        progress: whether to show a progress bar of the finished prompts.
        draft_tokens: the maximum number of tokens to draft for a sequence in each step; see `Many`.
        options: options of `make_prompt_cache`.

    Returns:
        An iterator over the generated tokens of all prompts, in the order of generation.

    Raises:
        ValueError: as `Many` and `Many.add`; most_at_once is below 1.
        TypeError: as `Many` and `Many.add`; `prompts` is a str.
    """
    own = ("max_tokens", "stop_tokens", "tokens_per_step", "most_at_once", "progress", "draft_tokens")
    check_options(options, "generate_many", own)
    if isinstance(prompts, str):
        token_ids(prompts, "prompts")  # raises
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be lists of tokens, got {class_of(prompts)}")
    whole(1, most_at_once=most_at_once, max_tokens=max_tokens)
    many = Many(model, tokens_per_step, draft_tokens, **options)
    stop = token_ids(stop_tokens, "stop_tokens")

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
