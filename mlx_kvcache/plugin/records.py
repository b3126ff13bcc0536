"""What ranks tell each other: a record of fixed size, and the words in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

RECORD = 1024
"""Bytes that each rank tells the others."""
SHOWN = 8
"""So many tokens of an input are told in words; all of them are in the digest."""
_DIGEST = 8
_ABOUT, _FED, _FAULT = 400, 120, 480
"""Bytes of the texts in a record, which end in a zero each."""
_PLURAL = {"is": "are", "was": "were"}


class Record(NamedTuple):
    """What one rank has told.

    Attributes:
        keys: digests of what it is about to do, and of the tokens that it was fed before.
        fault: why it cannot, or "".
    """

    keys: tuple[bytes, bytes]
    about: str
    fed: str
    fault: str


def told_tokens(tokens: mx.array) -> str:
    """Tokens in words: the first of them, and a digest of all."""
    # Widened on the host: an operation would wait for what a stream has to do before it.
    numbers = np.array(tokens).astype(np.int64).ravel()
    if numbers.size <= SHOWN:
        return str(numbers.tolist())
    first = ", ".join(map(str, numbers[:SHOWN].tolist()))
    return f"[{first}, ...] of {numbers.size} tokens with digest {_digest(numbers.tobytes()).hex()}"


def spelled(numbers: Sequence[int]) -> str:
    """A number, or several."""
    return str(numbers[0]) if len(numbers) == 1 else str(list(numbers))


def by_rank(texts: Sequence[str], verb: str) -> str:
    """What each rank said, those that said the same together; `verb` begins with "is" or "was"."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1:
        # Only in what is too long to be shown.
        return f"each rank {verb} {texts[0]}, which differs further on"
    return "; ".join(f"{_subject(own, verb)} {text or 'nothing'}" for text, own in ranks.items())


def _subject(ranks: Sequence[int], verb: str) -> str:
    *others, last = ranks
    if not others:
        return f"rank {last} {verb}"
    first, _, rest = verb.partition(" ")
    return f"ranks {', '.join(map(str, others))} and {last} {_PLURAL[first]} {rest}"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def encoded(about: str, fed: str, fault: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A record as bytes, each text cut to what there is place for."""
    texts = about.encode(), fed.encode(), fault.encode()
    data = _digest(texts[0]) + _digest(texts[1])
    for text, most in zip(texts, (_ABOUT, _FED, _FAULT), strict=True):
        data += text[:most].replace(b"\0", b" ") + b"\0"
    return np.frombuffer(data.ljust(RECORD, b"\0"), np.uint8)


def decoded(record: bytes) -> Record:
    """What `encoded` was given."""
    texts = record[2 * _DIGEST :].split(b"\0")
    about, fed, fault = (text.decode(errors="replace") for text in texts[:3])
    return Record((record[:_DIGEST], record[_DIGEST : 2 * _DIGEST]), about, fed, fault)
