"""Chooses the next tokens of sequences: samples them from logits, and drafts those that are likely.

A draft has the tokens that followed the newest ones where they occurred before in the text (prompt lookup
decoding, Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; a form of speculative decoding,
arXiv 2211.17192).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

Sampler = Callable[[mx.array], mx.array]
"""Maps log probabilities (1, vocabulary) to a token (1,), like mlx-lm's samplers."""

greedy: Sampler = partial(mx.argmax, axis=-1)
"""Chooses the likeliest token."""
NGRAMS = (3, 2)
"""The numbers of newest tokens that a draft looks for in the text, the first that is found."""
LONGEST_PAUSE = 32
"""The largest number of steps between two drafts."""


class Drawn:
    """The tokens that samplers choose from some rows of logits (n, vocabulary).

    They are computed together, so that reading them waits for the device once. Only after drafts does a
    sampler choose one token after another, because a rejected draft leaves the rest out.

    Args:
        given: the sampler of each ticket and its rows.

    Attributes:
        tokens: those that are computed together, an array (m,).
        places: where the tokens of each ticket begin in it.
    """

    def __init__(self, logits: mx.array, given: Mapping[int, tuple[Sampler, range]]) -> None:
        likeliest, drawn = dict[int, range](), dict[int, mx.array]()
        self._later: dict[int, Iterator[int]] = {}
        for ticket, (sampler, own) in given.items():
            if sampler is greedy:
                likeliest[ticket] = own
                continue
            logprobs = _normalized(logits[own.start : own.stop])
            if len(own) == 1:
                drawn[ticket] = sampler(logprobs).reshape(1).astype(mx.uint32)
            else:
                self._later[ticket] = _sampled(sampler, logprobs)
        rows = [row for own in likeliest.values() for row in own]
        chosen = logits if rows == list(range(len(logits))) else logits[mx.array(rows, mx.int32)]
        pieces = [*([greedy(_normalized(chosen))] if rows else []), *drawn.values()]
        self.tokens = mx.concatenate(pieces) if pieces else mx.zeros(0, mx.uint32)
        self._counts = {ticket: len(given[ticket][1]) for ticket in (*likeliest, *drawn)}
        self.places = dict(zip(self._counts, accumulate(self._counts.values(), initial=0), strict=False))

    def numbers(self) -> dict[int, Iterable[int]]:
        """Wait for the tokens of each ticket."""
        tokens: Any = self.tokens.tolist()
        found = {t: tokens[place : place + self._counts[t]] for t, place in self.places.items()}
        return found | self._later


def _sampled(sampler: Sampler, logprobs: mx.array) -> Iterator[int]:
    """Sample a token from each row of log probabilities (n, vocabulary), one after another."""
    for row in range(len(logprobs)):
        token: Any = sampler(logprobs[row : row + 1]).item()
        yield int(token)


def _normalized(logits: mx.array) -> mx.array:
    """Log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Drafter:
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
