"""What ranks tell each other: a record of fixed size, and the words in it.

Processes that run one model together, and agree on what they do to its caches.

Each has its own layers or heads, and makes the same calls as the others. Before anything changes
they tell each other what they are about to do and whether they can, by one `all_gather` of a
kilobyte. So a rank that is about to do something else, or cannot, stops all of them while their
caches still are alike. MLX's collectives are paired by order alone: without this, ranks that
differ would wait for each other without end, or add up arrays that do not belong together.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import CacheError, RanksDisagreeError
from .hosts.layout import found_logits

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


_KNOWN = "_is_known_to_all_ranks"
"""An attribute of exceptions that need not be told to the other ranks any more."""


class Ranks:
    """The ranks of a group. Of a single one every method does nothing.

    Sections and votes of one process must come from one thread at a time, in the same order on
    every rank: those of several models and caches too.

    Attributes:
        rank: of this process.
        size: of the group.
    """

    def __init__(self, group: mx.distributed.Group | None) -> None:
        self.group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self._votes = 0
        self._named = 0
        self._sections: list[_Section] = []
        self._fed: tuple[mx.array, Sequence[int]] | None = None
        self._stream: mx.Stream | None = None
        self._output: Callable[[], mx.array | None] = lambda: None

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def new_name(self) -> str:
        """A name that other ranks give to the same thing: by the votes before it, which all have taken."""
        self._named += 1
        return f"{self._votes}.{self._named}"

    def agree(self, about: str, error: Exception | None = None) -> None:
        """Find out whether all ranks are about to do this, and can.

        Args:
            about: what, as a verb with its numbers.
            error: why this rank cannot.

        Raises:
            RanksDisagreeError: another rank is about to do something else, cannot, or was fed
                other tokens before. On a rank that gives an error it is that error, unless ranks
                are about to do different things.
            CacheError: the others cannot be reached.
        """
        if self.is_alone:
            if error:
                raise error
            return
        fault = f"{type(error).__name__}: {error}" if error else ""
        told = [decoded(record) for record in self._exchange(encoded(about, self._fed_text(), fault))]
        failure = self._failure(told, error)
        if failure is not None:
            vars(failure)[_KNOWN] = True
            if failure is error:
                raise error
            raise failure from error

    @contextmanager
    def together(self, about: str) -> Iterator[None]:
        """A section that all ranks go through, or none.

        It prepares something, calls `ready`, and only then changes anything. An exception before
        that is told to the others; a section that never calls it votes at its end.

        Raises:
            RanksDisagreeError, CacheError: as `agree`.
        """
        if self.is_alone:
            yield
            return
        section = _Section(about)
        self._sections.append(section)
        try:
            yield
            self.ready()
        except Exception as error:
            # What all have agreed on, or what comes from an inner section, all of them know.
            if section.has_voted or _KNOWN in vars(error):
                raise
            section.has_voted = True
            self.agree(about, error)
        finally:
            self._sections.pop()

    def ready(self) -> None:
        """Vote for the innermost section, once. Raises as `agree`."""
        if self._sections and not self._sections[-1].has_voted:
            self._sections[-1].has_voted = True
            self.agree(self._sections[-1].about)

    def passed(self, tokens: mx.array | None, positions: Sequence[int], output: Any) -> None:
        """The model has been called, so that its collectives come on what is now the CPU's stream.

        Args:
            tokens: what it was given, if that is to be compared at the next vote: by then it is
                evaluated anyhow.
            positions: where its tokens begin.
            output: of the model. It is not kept, as a prompt's logits are large and often not wanted.
        """
        logits = found_logits(output)
        self._output = (lambda: None) if logits is None else weakref.ref(logits)
        self._fed = None if tokens is None else (tokens, positions)
        self._stream = mx.default_stream(mx.cpu)

    def enqueue(self, arrays: Sequence[mx.array]) -> None:
        """Let arrays be computed, and the model's last output if somebody has it, if nobody has asked yet.

        Otherwise a rank that needs one for something of its own, such as a longer buffer, would
        begin the model's collectives earlier than others do.
        """
        output = self._output()
        mx.async_eval(*arrays, *([] if output is None else [output]))  # type: ignore[no-untyped-call]

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers. Raises CacheError where the others cannot be reached."""
        if self.is_alone:
            return number
        return min(int(text) for text in self.share("compare numbers", str(int(number))))

    def share(self, about: str, text: str) -> list[str]:
        """The texts of all ranks, of at most 480 bytes. Raises as `agree`."""
        if self.is_alone:
            return [text]
        told = [decoded(record) for record in self._exchange(encoded(about, "", text))]
        if len({one.keys for one in told}) > 1:
            failure = self._disagreement([one.about for one in told], "is about to")
            vars(failure)[_KNOWN] = True
            raise failure
        return [one.fault for one in told]

    def _failure(self, told: Sequence[Record], error: Exception | None) -> Exception | None:
        """What is wrong with what the ranks have told."""
        abouts, feds = ([one.keys[i] for one in told] for i in range(2))
        before = ""
        if len(set(feds)) > 1:
            before = by_rank([one.fed for one in told], "was fed")
        if len(set(abouts)) > 1:
            return self._disagreement(
                [one.about for one in told], "is about to", before and f" Before that {before}."
            )
        if error is not None:
            return error
        faults = {rank: one for rank, one in enumerate(told) if one.fault}
        if faults:
            rank, first = next(iter(faults.items()))
            return RanksDisagreeError(
                f"rank {rank} of {self.size} cannot {first.about}: {first.fault}; no rank has",
                tuple(one.fault for one in told),
            )
        if before:
            return self._disagreement(
                [one.fed for one in told],
                "was fed",
                "; these tokens are in the caches and can be rewound: seeds or prompts differ",
            )
        return None

    def _disagreement(self, texts: Sequence[str], verb: str, more: str = "") -> RanksDisagreeError:
        return RanksDisagreeError(f"ranks disagree: {by_rank(texts, verb)}{more}", tuple(texts))

    def _fed_text(self) -> str:
        """The tokens that nobody has compared yet."""
        fed, self._fed = self._fed, None
        return f"{told_tokens(fed[0])} at {spelled(fed[1])}" if fed else ""

    def _exchange(self, record: np.ndarray[Any, np.dtype[np.uint8]]) -> list[bytes]:
        """Every rank's record."""
        stream, now = self._stream, mx.default_stream(mx.cpu)
        if stream is not None and stream != now:
            # Two streams are two threads, and collectives of both would mix on the same sockets.
            mx.synchronize(stream)
            self._stream = None
        self._votes += 1
        self._named = 0
        try:
            gathered = mx.distributed.all_gather(mx.array(record), group=self.group)
            mx.eval(gathered)
        except RuntimeError as error:
            lost = CacheError(
                f"rank {self.rank} of {self.size} cannot reach the others, of which one may have ended: "
                f"{error}"
            )
            vars(lost)[_KNOWN] = True
            raise lost from error
        return [bytes(row) for row in np.array(gathered).reshape(self.size, RECORD)]


class _Section:
    """What ranks are about to do, and whether they have voted on it."""

    def __init__(self, about: str) -> None:
        self.about = about
        self.has_voted = False


ALONE = Ranks(None)
_groups: dict[tuple[int, int], Ranks] = {}
_lock = threading.Lock()


def ranks_of(group: mx.distributed.Group | None) -> Ranks:
    """The ranks of a group, the same object each time. Raises TypeError for what is no group."""
    if group is not None and not isinstance(group, mx.distributed.Group):
        raise TypeError(f"group must be of mx.distributed.init(), or None, got {type(group).__name__}")
    if group is None or group.size() == 1:
        return ALONE
    with _lock:
        # MLX makes an object at each `init`; a process is in one group of each size.
        return _groups.setdefault((group.rank(), group.size()), Ranks(group))
