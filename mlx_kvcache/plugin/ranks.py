"""Keeps the caches of several processes (ranks) that run one model together consistent.

Each rank has its own layers or heads and must make the same calls as the others. Before a call changes
anything, the ranks exchange a record of 1,024 bytes with one `all_gather`: what each is about to do, and
whether it can. If a rank is about to do something else, or cannot, all ranks raise while their caches are
still alike. MLX pairs collectives only by their order, so without this check ranks that differ would wait
forever or add up arrays that do not belong together.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import CacheError, RanksDisagreeError
from .hosts.host import found_logits

RECORD = 1024
"""Size of a record in bytes."""
SHOWN = 8
"""Number of an input's tokens that a record lists. The digest covers all of them."""
_DIGEST = 8
_ABOUT, _FED, _FAULT = 400, 120, 480
"""Maximum bytes of each text in a record, without the zero that ends it."""


class Record(NamedTuple):
    """What one rank is about to do, and the tokens that its model was called with since the last vote."""

    keys: tuple[bytes, bytes]
    """Digests of `about` and `fed`, computed before they were cut to fit."""
    about: str
    fed: str
    fault: str
    """Why the rank cannot do it, or ""."""


def told_tokens(tokens: mx.array | Sequence[int]) -> str:
    """Describe tokens: all of them if they are few, else the first ones and a digest of all."""
    # Converted with NumPy: an MLX operation would wait for earlier work of its stream.
    numbers = np.array(tokens).astype(np.int64).ravel()
    if numbers.size <= SHOWN:
        return str(numbers.tolist())
    first = ", ".join(map(str, numbers[:SHOWN].tolist()))
    return f"[{first}, ...] of {numbers.size} tokens with digest {_digest(numbers.tobytes()).hex()}"


def spelled(numbers: Sequence[int]) -> str:
    """Format one number, or a list of them."""
    return str(numbers[0]) if len(numbers) == 1 else str(list(numbers))


def by_rank(texts: Sequence[str], verb: str) -> str:
    """Describe the ranks' texts, with equal ones grouped; `verb` begins with "is" or "was"."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1:
        # Their digests differ, so the difference is in the part that was cut off.
        return f"each rank {verb} {texts[0]}, which differs in the part not shown"
    parts = []
    plural = verb.replace("is ", "are ").replace("was ", "were ")
    for text, (*others, last) in ranks.items():
        who = f"ranks {', '.join(map(str, others))} and {last} {plural}" if others else f"rank {last} {verb}"
        parts.append(f"{who} {text or 'nothing'}")
    return "; ".join(parts)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def encoded(about: str, fed: str, fault: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Encode a record. Texts that are too long are cut."""
    data = _digest(about.encode()) + _digest(fed.encode())
    for text, most in ((about, _ABOUT), (fed, _FED), (fault, _FAULT)):
        data += text.encode()[:most].replace(b"\0", b" ") + b"\0"
    return np.frombuffer(data.ljust(RECORD, b"\0"), np.uint8)


def decoded(record: bytes) -> Record:
    """Decode a record."""
    about, fed, fault, *_ = (text.decode(errors="replace") for text in record[2 * _DIGEST :].split(b"\0"))
    return Record((record[:_DIGEST], record[_DIGEST : 2 * _DIGEST]), about, fed, fault)


_KNOWN = "_is_known_to_all_ranks"
"""Attribute of exceptions that all ranks have already been informed of."""

Error = TypeVar("Error", bound=Exception)


def _known(error: Error) -> Error:
    vars(error)[_KNOWN] = True
    return error


def _disagreement(texts: Sequence[str], verb: str, more: str = "") -> RanksDisagreeError:
    return _known(RanksDisagreeError(f"ranks disagree: {by_rank(texts, verb)}{more}", tuple(texts)))


class Ranks:
    """The ranks of a group, and the votes by which they agree. A group of one exchanges nothing.

    All sections and votes of a process, including those of different models and caches, must be made
    from one thread at a time and in the same order on every rank.
    """

    def __init__(self, group: mx.distributed.Group | None) -> None:
        self.group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.is_alone = self.size == 1
        self._votes = 0
        self._named = 0
        self._sections: list[_Section] = []
        self._fed: tuple[mx.array, Sequence[int]] | None = None
        self._stream: mx.Stream | None = None
        self._output: Callable[[], mx.array | None] = lambda: None

    def new_name(self) -> str:
        """Return a name that is the same on all ranks: it counts the votes so far and the names since."""
        self._named += 1
        return f"{self._votes}.{self._named}"

    def agree(self, about: str, error: Exception | None = None) -> None:
        """Vote: raise unless all ranks are about to do the same and can do it.

        Args:
            about: what this rank is about to do: a verb with its numbers.
            error: why this rank cannot do it. It raises this, unless ranks are about to do different things.

        Raises:
            RanksDisagreeError: another rank is about to do something else, cannot, or was fed other tokens.
            CacheError: the other ranks cannot be reached.
        """
        if self.is_alone:
            if error:
                raise error
            return
        fault = f"{type(error).__name__}: {error}" if error else ""
        fed, self._fed = self._fed, None
        told = self._exchange(about, f"{told_tokens(fed[0])} at {spelled(fed[1])}" if fed else "", fault)
        failure = self._failure(told, error)
        if failure is None:
            return
        if failure is error:
            raise _known(failure)
        raise _known(failure) from error

    @contextmanager
    def together(self, about: str) -> Iterator[None]:
        """Enclose a change that either all ranks make or none. Raises like `agree`.

        The section prepares the change, calls `ready`, and only then changes anything. The other ranks are
        informed of an exception before `ready`. A section that does not call `ready` votes at its end.
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
            # After the vote, or if an inner section has voted on the error, all ranks know.
            if section.has_voted or _KNOWN in vars(error):
                raise
            section.has_voted = True
            self.agree(about, error)
        finally:
            self._sections.pop()

    def ready(self) -> None:
        """Vote for the innermost section, once. Raises like `agree`."""
        if self._sections and not self._sections[-1].has_voted:
            self._sections[-1].has_voted = True
            self.agree(self._sections[-1].about)

    def passed(self, tokens: mx.array | None, positions: Sequence[int], output: Any) -> None:
        """Record a call of the model. Its collectives run on the present default CPU stream.

        Args:
            tokens: the input, if the next vote is to compare it (it is evaluated by then), else None.
            positions: the position of the first token of each row.
            output: the model's output. Only a weak reference is kept: a prompt's logits are large.
        """
        logits = found_logits(output)
        self._output = (lambda: None) if logits is None else weakref.ref(logits)
        self._fed = None if tokens is None else (tokens, positions)
        self._stream = mx.default_stream(mx.cpu)

    def enqueue(self, arrays: Sequence[mx.array]) -> None:
        """Start the evaluation of arrays, and of the model's last output if it is still referenced.

        Otherwise a rank that evaluates an array for a reason of its own, such as a growing buffer, would
        start the model's collectives earlier than other ranks.
        """
        output = self._output()
        mx.async_eval(*arrays, *([] if output is None else [output]))  # type: ignore[no-untyped-call]

    def least(self, number: int) -> int:
        """Return the smallest of all ranks' numbers. Raises CacheError if the others cannot be reached."""
        return min(int(text) for text in self.share("compare numbers", str(int(number))))

    def share(self, about: str, text: str) -> list[str]:
        """Return the texts of all ranks, each cut to 480 bytes. Raises like `agree`."""
        if self.is_alone:
            return [text]
        told = self._exchange(about, "", text)
        if len({one.keys for one in told}) > 1:
            raise _disagreement([one.about for one in told], "is about to")
        return [one.fault for one in told]

    def _failure(self, told: Sequence[Record], error: Exception | None) -> Exception | None:
        """Return the error that the ranks' records call for, or None."""
        before = ""
        if len({one.keys[1] for one in told}) > 1:
            before = by_rank([one.fed for one in told], "was fed")
        if len({one.keys[0] for one in told}) > 1:
            more = before and f" Before that {before}."
            return _disagreement([one.about for one in told], "is about to", more)
        if error is not None:
            return error
        for rank, one in enumerate(told):
            if one.fault:
                message = f"rank {rank} of {self.size} cannot {one.about}: {one.fault}; no rank has done it"
                return RanksDisagreeError(message, tuple(one.fault for one in told))
        if before:
            more = "; these are in the caches and can be rewound; give all ranks the same seeds and prompts"
            return _disagreement([one.fed for one in told], "was fed", more)
        return None

    def _exchange(self, about: str, fed: str, fault: str) -> list[Record]:
        """Return the records of all ranks."""
        stream, now = self._stream, mx.default_stream(mx.cpu)
        if stream is not None and stream != now:
            # Each stream has its own thread: collectives of two streams would mix on the same sockets.
            mx.synchronize(stream)
            self._stream = None
        self._votes += 1
        self._named = 0
        try:
            record = mx.array(encoded(about, fed, fault))
            gathered = mx.distributed.all_gather(record, group=self.group)
            mx.eval(gathered)
        except RuntimeError as error:
            lost = f"cannot reach the other ranks; one may have exited: {error}"
            raise _known(CacheError(f"rank {self.rank} of {self.size} {lost}")) from error
        return [decoded(bytes(row)) for row in np.array(gathered).reshape(self.size, RECORD)]


@dataclass
class _Section:
    """A change that ranks are about to make, and whether they have voted on it."""

    about: str
    has_voted: bool = False


ALONE = Ranks(None)
_groups: dict[tuple[int, int], Ranks] = {}
_lock = threading.Lock()


def ranks_of(group: mx.distributed.Group | None) -> Ranks:
    """Return the ranks of a group, always the same object. Raises TypeError for other values."""
    if group is not None and not isinstance(group, mx.distributed.Group):
        raise TypeError(
            f"group must be returned by mx.distributed.init(), or None, got {type(group).__name__}"
        )
    if group is None or group.size() == 1:
        return ALONE
    with _lock:
        # MLX makes a new object at each `init`; a process is in one group of each size.
        return _groups.setdefault((group.rank(), group.size()), Ranks(group))
