"""Continuous batching: generates for many sequences, which can join and leave at every step.

Each step calls the model once, with one token of every generating sequence and with as many prompt tokens
as fit into the rest of the step. A long prompt is thus read in chunks and delays the other sequences by one
step at a time (chunked prefill, "Sarathi-Serve", arXiv 2403.02310).

With `draft_tokens`, the rest of a step also tries tokens that are likely to come next: those that followed
the newest tokens where they occurred before in the text (prompt lookup decoding, Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding; a form of speculative decoding, arXiv 2211.17192).
One call then checks them all, and the cache rolls back those that are not what the sampler chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count, islice, repeat
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
from ..prompt_cache import PromptCache, make_prompt_cache
from ..ranks import ranks_of

Sampler = Callable[[mx.array], mx.array]
"""Maps log probabilities (1, vocabulary) to a token (1,), like mlx-lm's samplers."""

Finish = Literal["stop", "length", "cancelled", "full", "closed", "interrupted"]

NGRAMS = (3, 2)
"""The numbers of newest tokens that a draft looks for in the text, the first that is found."""
LONGEST_PAUSE = 32
"""The largest number of steps between two drafts."""


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


class _Drafter:
    """Drafts the next tokens of a text: those that followed its newest tokens where they occurred before.

    A draft has at most 1 token more than twice as many as were accepted of the draft before. After a draft
    of which none was accepted, the next steps have no draft: 1 step, then 2, 4, up to `LONGEST_PAUSE`.

    Drafts only change the speed, so a step that raises need not restore a drafter, and an interrupt may keep
    tokens from it.
    """

    def __init__(self, text: Iterable[int]) -> None:
        self._text: list[int] = []
        # For each n-gram, the index of the token that followed it last.
        self._followers: dict[tuple[int, ...], int] = {}
        self._longest = sys.maxsize
        self._pause, self._steps_left = 1, 0
        self._extend(text)

    def draft(self, most: int) -> list[int]:
        """Return at most `most` tokens."""
        if self._steps_left:
            self._steps_left -= 1
            return []
        text, n = self._text, min(most, self._longest)
        for size in NGRAMS:
            begin = self._followers.get(tuple(text[-size:]))
            if begin is not None:
                # Where fewer than n tokens follow, what follows them is a repetition.
                return [text[begin + i % (len(text) - begin)] for i in range(n)]
        return []

    def learn(self, tokens: Sequence[int], drafted: int, accepted: int) -> None:
        """Append generated tokens, and note how many of a draft were accepted."""
        self._extend(tokens)
        if drafted:
            self._longest = 2 * accepted + 1
            self._steps_left = 0 if accepted else self._pause
            self._pause = 1 if accepted else min(2 * self._pause, LONGEST_PAUSE)

    def _extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            # An n-gram is indexed once its follower is there, so that the newest one does not find itself.
            end = len(self._text)
            self._text.append(token)
            for size in NGRAMS:
                if size <= end:
                    self._followers[tuple(self._text[end - size : end])] = end


@dataclass(frozen=True)
class _Sequence:
    """A running sequence: `tokens` are those to compute next, the rest of the prompt or a generated one."""

    cache: PromptCache
    tokens: list[int]
    left: int
    sampler: Sampler
    stop: frozenset[int]
    drafter: _Drafter | None = None
    is_generating: bool = False

    @property
    def most(self) -> int:
        """The longest block that the cache can take at once after making room."""
        capacity, overflow, sinks, *_ = self.cache._conversation.limits
        return sys.maxsize if capacity is None or overflow == "error" else capacity - sinks

    def draft(self, most: int) -> list[int]:
        """Draft at most `most` tokens that come after the pending one and that the cache can roll back."""
        if self.drafter is None:
            return []
        position, quantization = self.cache.position, self.cache.pool.quantization
        limits = self.cache._conversation.limits
        # `rewind` tokens can always be dropped. One of them is the pending token, for when a step raises.
        most = min(most, limits.rewind - 1, self.left - 1)
        # Where a draft would make the cache shift or quantize before plain decoding does.
        for border in (limits.capacity, quantization.after if quantization else None):
            if border is not None and position < border:
                most = min(most, border - position - 1)
        return self.drafter.draft(most) if most > 0 else []


class _Block(NamedTuple):
    """The tokens of one sequence in a step, of which the last ones may be drafts."""

    tokens: list[int]
    drafts: Sequence[int] = ()


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
        self._entries: list[Any] | None = None
        """The cache list of the last step, if each sequence had one token in it and none has ended since."""
        first = make_prompt_cache(model, **self._options)
        # A reference to the pool, so that later caches are made in it.
        self._pool = first.pool
        # The shape is known without evaluating the logits.
        self._vocabulary = logits_of(model, mx.zeros((1, 1), mx.int32), first).shape[-1]
        if self._pool.layout.is_recurrent and not self._pool.mixers:
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
            sampler: chooses the next token; None takes the likeliest.
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
        drafter = _Drafter(tokens) if self._most_drafted else None
        self._sequences[ticket] = _Sequence(cache, tokens, max_tokens, sampler or _greedy, stop, drafter)
        return ticket

    def cancel(self, ticket: int) -> PromptCache:
        """End a sequence early and return its cache. Raises ValueError if the ticket's is not running."""
        sequence = self._sequences.get(ticket)
        if sequence is None:
            raise ValueError(f"no sequence {ticket} is running; running: {sorted(self._sequences)}")
        self._end(Generated(ticket, None, "cancelled"))
        return sequence.cache

    def step(self) -> list[Generated]:
        """Call the model once.

        If the model or a sampler raises, the caches roll back and the next step repeats the tokens of this
        one. A sequence whose cache cannot roll back ends ("interrupted").

        Returns:
            The tokens of this step, and the sequences that have ended since the last one.
        """
        chosen = self._chosen()
        begins = {ticket: self._sequences[ticket].cache.position for ticket in chosen}
        try:
            after, new = self._computed(chosen)
            results = [result for own in new.values() for result in own]
            if any(result.finish for result in results):
                # It would keep the conversations of sequences that have ended.
                self._entries = None
            self._sequences, self._ended = after, [*self._ended, *results]
        except BaseException as error:
            for ticket, begin in begins.items():
                try:
                    self._sequences[ticket].cache.rewind_to(begin)
                except CacheError as refusal:
                    refusal.__cause__ = error
                    self._end(Generated(ticket, None, "interrupted", refusal))
            raise
        self._learn(chosen, new)
        # In one line: if an exception comes before it, the next step returns these results.
        return list(map(self._ended.pop, repeat(0, len(self._ended))))

    def _chosen(self) -> dict[int, _Block]:
        """Choose the tokens of the next step: one of each generating sequence, then blocks of prompts.

        If `tokens_per_step` or more sequences are generating, all sequences take turns. Drafts share what is
        left, so that no sequence waits for them.
        """
        chosen: dict[int, _Block] = {}
        room = self._most
        generating = [t for t, s in self._sequences.items() if s.is_generating]
        starting = sorted(self._sequences.keys() - set(generating))
        # self._sequences is in the order of service: those that have waited longest come first.
        for ticket in list(self._sequences) if len(generating) >= room else [*generating, *starting]:
            sequence = self._sequences[ticket]
            tokens = sequence.tokens[: min(room, sequence.most)]
            if not tokens:
                continue
            try:
                if sequence.cache.pool is not self._pool:
                    raise CacheError("the cache has moved to another pool since it was added")
                with sequence.cache._rows.edit(f"make room for {len(tokens)} tokens"):
                    conversation = sequence.cache._conversation
                    conversation.join_waiting(early=True)
                    # Other tokens may join after some of these.
                    tokens = tokens[: min(conversation.edges(len(tokens)), default=len(tokens))]
                    conversation.make_room(len(tokens), early=True)
            except CacheError as error:
                finish: Finish = "full" if isinstance(error, CacheFullError) else "closed"
                self._end(Generated(ticket, None, finish, error))
                continue
            chosen[ticket] = _Block(tokens)
            room -= len(tokens)
        drafting = [ticket for ticket in chosen if self._sequences[ticket].is_generating]
        for sharing, ticket in zip(range(len(drafting), 0, -1), drafting, strict=True):
            drafts = self._sequences[ticket].draft(min(self._most_drafted, room // sharing))
            chosen[ticket] = _Block([*chosen[ticket].tokens, *drafts], drafts)
            room -= len(drafts)
        return chosen

    def _computed(self, chosen: dict[int, _Block]) -> tuple[dict[int, _Sequence], dict[int, list[Generated]]]:
        """Call the model. Returns the sequences after it, and the tokens of those whose prompt is read."""
        # The sequences served in this step move behind the others.
        unserved = {t: s for t, s in self._sequences.items() if t not in chosen}
        after, new = {**unserved, **self._sequences}, dict[int, list[Generated]]()
        for ticket, block in chosen.items():
            after[ticket] = replace(after[ticket], tokens=after[ticket].tokens[len(block.tokens) :])
        logits = dict(self._logits(chosen)) if chosen else {}
        ready = {ticket: own for ticket, own in logits.items() if not after[ticket].tokens}
        if len(ready) < len(chosen):
            # Sequences still reading their prompt are part of the same computation.
            mx.eval(list(ready.values()))
        sampled = _all_sampled({ticket: (after[ticket].sampler, own) for ticket, own in ready.items()})
        for ticket in ready:
            sequence, drafts = after[ticket], chosen[ticket].drafts
            results = new[ticket] = _generated(ticket, sequence, drafts, sampled[ticket])
            rejected = len(drafts) + 1 - len(results)
            if rejected:
                try:
                    sequence.cache.rewind(rejected)
                except CacheError as error:
                    results[-1] = results[-1]._replace(finish=results[-1].finish or "closed", error=error)
            last = results[-1]
            if last.finish or last.token is None:
                del after[ticket]
            else:
                left = sequence.left - len(results)
                after[ticket] = replace(sequence, tokens=[last.token], left=left, is_generating=True)
        return after, new

    def _learn(self, chosen: dict[int, _Block], new: dict[int, list[Generated]]) -> None:
        """Count drafted and accepted tokens, and tell the drafters."""
        for ticket, results in new.items():
            tokens = [result.token for result in results if result.token is not None]
            drafts, sequence = chosen[ticket].drafts, self._sequences.get(ticket)
            accepted = sum(a == b for a, b in zip(drafts, tokens, strict=False))
            self.drafted += len(drafts)
            self.accepted += accepted
            if sequence and sequence.drafter:
                sequence.drafter.learn(tokens, len(drafts), accepted)

    def _end(self, last: Generated) -> None:
        others = {ticket: own for ticket, own in self._sequences.items() if ticket != last.ticket}
        self._sequences, self._ended, self._entries = others, [*self._ended, last], None

    def _logits(self, chosen: dict[int, _Block]) -> Iterator[tuple[int, mx.array]]:
        """Yield the logits (1 + drafts, vocabulary) after each sequence's last token and its drafts."""
        if not self._pool.mixes:
            for ticket, (tokens, drafts) in chosen.items():
                cache = self._sequences[ticket].cache
                yield ticket, logits_of(self._model, mx.array([tokens]), cache)[0, -1 - len(drafts) :]
            return
        conversations = [self._sequences[ticket].cache._conversation for ticket in chosen]
        counts = [len(block.tokens) for block in chosen.values()]
        entries, self._entries = self._entries, None
        if entries is None or any(n > 1 for n in counts) or entries[0].rows.conversations != conversations:
            entries = entries_of(TokenRows(self._pool, conversations, counts))
        rows = mx.array([[token] for block in chosen.values() for token in block.tokens])
        logits = logits_of(self._model, rows, entries)[:, 0]
        if all(n == 1 for n in counts):
            self._entries = entries
        for (ticket, block), end in zip(chosen.items(), accumulate(counts), strict=True):
            yield ticket, logits[end - 1 - len(block.drafts) : end]


_greedy: Sampler = partial(mx.argmax, axis=-1)


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


def _all_sampled(given: Mapping[int, tuple[Sampler, mx.array]]) -> dict[int, Iterable[int]]:
    """Sample from the logits (n, vocabulary) of each ticket: a token for each row.

    Tokens are computed together, which waits for the device once. Only after drafts does a sampler choose one
    token after another, because a rejected draft leaves the rest out.
    """
    greedy = {ticket: logits for ticket, (sampler, logits) in given.items() if sampler is _greedy}
    others = {ticket: own for ticket, own in given.items() if ticket not in greedy}
    drawn = {t: sampler(_normalized(own)) for t, (sampler, own) in others.items() if len(own) == 1}
    sampled: dict[int, Iterable[int]] = {
        t: _sampled(sampler, own) for t, (sampler, own) in others.items() if t not in drawn
    }
    likeliest = _greedy(_normalized(mx.concatenate(list(greedy.values())))) if greedy else mx.zeros(0)
    mx.eval(likeliest, *drawn.values())
    sampled |= {ticket: [_number(token)] for ticket, token in drawn.items()}
    tokens: Any = likeliest.tolist()
    for ticket, end in zip(greedy, accumulate(map(len, greedy.values())), strict=True):
        sampled[ticket] = tokens[end - len(greedy[ticket]) : end]
    return sampled


def _sampled(sampler: Sampler, logits: mx.array) -> Iterator[int]:
    """Sample a token from each row of logits (n, vocabulary), one after another."""
    logits = _normalized(logits)
    for row in range(len(logits)):
        yield _number(sampler(logits[row : row + 1]))


def _number(token: mx.array) -> int:
    number: Any = token.item()
    return int(number)


def _normalized(logits: mx.array) -> mx.array:
    """Log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


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
