"""Saves a sequence of a cache to a file, and loads it into another cache.

Saving has two steps: `prepare` copies a sequence out of MLX, and `Prepared.write` writes the copy, which
any thread may do. Loading also has two: `open_file` reads and validates a file, and the cache plans the
restore before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..arguments import token_ids, whole
from ..caches.base import PlanningCache
from ..caches.snapshot import Snapshot, part_of
from ..errors import CacheFileError
from . import container
from .container import faults_of
from .header import short
from .schema import (
    as_stored,
    decode,
    encode,
    integer,
    keeps_all,
    listing,
    load_arrays,
    mapping,
    names_before,
    shaped,
)

_TOKENS, _BASE = "tokens", "base"
LONGEST = 32
"""The most files that hold one sequence together."""


class Base(NamedTuple):
    """The file beside another one that holds the first `length` tokens of its sequence."""

    name: str
    length: int


def base_of(header: Mapping[str, Any]) -> Base | None:
    """Return the base that a file's header names. Raises ValueError if that is no file's name."""
    told = header.get(_BASE)
    if told is None:
        return None
    name, length = listing(told, "base", 2)
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"the base must be the name of a file in the same folder, got {short(name)}")
    return Base(name, integer(length, "length of the base", 1))


class Prepared(NamedTuple):
    """A copy of a sequence outside MLX's memory, which any thread may write."""

    header: dict[str, Any]
    arrays: dict[str, container.Stored]

    @property
    def base(self) -> Base | None:
        """The file that holds the first tokens."""
        return base_of(self.header)

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        return sum(stored.data.nbytes for stored in self.arrays.values())

    def write(self, path: str | PathLike[str], ready: Callable[[], None] = lambda: None) -> int:
        """As `container.write`."""
        return container.write(Path(path), self.header, self.arrays, ready)


def prepare(
    caches: Sequence[PlanningCache],
    sequence: int,
    tokens: Sequence[int] | None = None,
    model: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, mx.array] | None = None,
    base: Base | None = None,
) -> Prepared:
    """Copy a sequence out of caches, without unused cells. Evaluates the arrays.

    Args:
        caches, sequence: caches that hold the same sequence, and the sequence.
        tokens, model: as in `save`.
        options: a JSON object to save with the sequence.
        extra: more arrays, with names that begin with a letter.
        base: a file that holds the first tokens, so that caches which keep all tokens leave them out.

    Raises:
        TypeError: a token is not a whole number.
        ValueError: the number of tokens is not the length of the sequence, or a token is outside [0, 2**63).
    """
    end, arrays = caches[0].end(sequence), dict(extra or {})
    if tokens is not None:
        tokens = token_ids(tokens)
        if len(tokens) != end:
            raise ValueError(f"got {len(tokens)} tokens for a sequence of {end}")
        if outside := [token for token in tokens if not 0 <= token < 2**63]:
            raise ValueError(f"token {outside[0]} is out of range, expected 0 to 2**63 - 1")
        arrays[_TOKENS] = mx.array(np.array(tokens, np.int64))
    header = {
        "end": end,
        "caches": [
            encode(cache, sequence, arrays, f"{i}.", base.length if base else 0)
            for i, cache in enumerate(caches)
        ],
        "model": dict(model or {}),
        "options": dict(options or {}),
        "has_tokens": tokens is not None,
    }
    if base:
        header[_BASE] = list(base)
    return Prepared(header, as_stored(arrays))


@dataclass(frozen=True)
class Opened:
    """The contents of a file.

    Attributes:
        path: the file.
        end: the length of the sequence in tokens.
        model: names and values that identify the model, as saved.
        options: the JSON object that was saved with the sequence.
        tokens: the token IDs, or None if they were not saved.
        arrays: the arrays by name.
        is_verified: whether the arrays' checksums were compared.
        base: the file that holds the first tokens, and their number.
    """

    path: Path
    end: int
    model: dict[str, Any]
    options: dict[str, Any]
    tokens: list[int] | None
    arrays: dict[str, mx.array] = field(repr=False)
    is_verified: bool
    _caches: list[Any] = field(repr=False)
    base: tuple[Opened, int] | None = None

    def check_model(self, model: Mapping[str, str]) -> None:
        """Raise CacheFileError if the file was saved for another model.

        Args:
            model: names and values that identify the model. Names that the file lacks are ignored.
        """
        for name, value in model.items():
            if self.model.get(name, value) != value:
                raise CacheFileError(
                    self.path,
                    f"of another model: its {name} is {self.model[name]}, this one's is {value}; "
                    "load it with the model and tokenizer that it was saved with",
                )

    def snapshots(self, caches: Sequence[PlanningCache]) -> list[Any]:
        """Decode one snapshot for each cache. Raises CacheFileError if the file does not fit the caches."""
        return [self._snapshot(cache, index, len(caches)) for index, cache in enumerate(caches)]

    def _snapshot(self, cache: PlanningCache, index: int, count: int, until: int | None = None) -> Any:
        """Decode the snapshot of one of `count` caches, or only what its first `until` tokens need."""
        with faults_of(self.path):
            told = listing(self._caches, "caches", count)[index]
            own = decode(cache, told, self.end, self.arrays, f"{index}.", until)
        if self.base is None or not keeps_all(cache):
            return own
        opened, length = self.base
        before = opened._snapshot(cache, index, count, length)
        return Snapshot(own.end, part_of(before, 0, length) + own.runs, own.forms or before.forms)


@lru_cache(maxsize=64)
def contents_of(path: Path) -> container.Contents:
    """As `read_contents` for a file that others may rely on.

    Such a file never changes and its name is never used again, so its header is read once for all of them.
    """
    return container.read_contents(path)


def open_file(path: str | PathLike[str], verify: bool = True, lazy: bool = False) -> Opened:
    """Read a file and validate its header, and the files that hold its first tokens.

    Args:
        path: the file.
        verify: compare the checksums of all arrays. Without it, corrupt arrays are not detected; the header
            is always verified.
        lazy: read each array, unverified, when it is first evaluated, which only this thread may do.

    Raises:
        NotOursError: another program wrote this safetensors file.
        CacheFileError: the file cannot be read, is corrupt, or is not a saved cache.
    """
    return _opened(container.read_contents(Path(path)), verify, lazy)


def _opened(
    contents: container.Contents,
    verify: bool,
    lazy: bool,
    until: int | None = None,
    most: int = LONGEST,
) -> Opened:
    """As `open_file`, but read only what the first `until` tokens need, and `most` files in all."""
    header, names = contents.header, None
    with faults_of(contents.path):
        caches = listing(header.get("caches"), "caches")
        if until is not None:
            own = (names_before(told, index, until, contents.entries) for index, told in enumerate(caches))
            names = [*({_TOKENS} & contents.entries.keys()), *chain.from_iterable(own)]
    arrays = load_arrays(contents, verify, lazy, names)
    with faults_of(contents.path):
        end = integer(header.get("end"), "end")
        tokens = (
            _checked(shaped(arrays, _TOKENS, (end,), mx.int64)) if header.get("has_tokens") is True else None
        )
        base = base_of(header)
        if base and (tokens is None or base.length > end or most < 2):
            raise ValueError(f"{end} tokens cannot begin with the {base.length} of {base.name}")
    before = None
    if base:
        told = contents_of(contents.path.with_name(base.name))
        before = _opened(told, verify, lazy, base.length, most - 1)
    with faults_of(contents.path):
        if base and before and (before.tokens or [])[: base.length] != (tokens or [])[: base.length]:
            raise ValueError(f"its first {base.length} tokens are not those of {base.name}")
        return Opened(
            contents.path,
            end,
            mapping(header.get("model"), "model"),
            mapping(header.get("options"), "options"),
            tokens,
            arrays,
            verify,
            caches,
            (before, base.length) if base and before else None,
        )


def _checked(tokens: mx.array) -> list[int]:
    """Return token IDs as integers. Raises ValueError if one is negative."""
    numbers = np.array(tokens)
    if (numbers < 0).any():
        raise ValueError(f"a token is {numbers.min()}, expected a whole number from 0 to {2**63 - 1}")
    found: list[int] = numbers.tolist()
    return found


def evaluate(caches: Sequence[PlanningCache], sequence: int) -> None:
    """Evaluate a sequence's arrays, so that other threads can use them."""
    arrays: dict[str, mx.array] = {}
    for i, cache in enumerate(caches):
        encode(cache, sequence, arrays, f"{i}.")
    mx.eval(list(arrays.values()))


def save(
    path: str | PathLike[str],
    cache: PlanningCache,
    sequence: int,
    tokens: Sequence[int] | None = None,
    model: Mapping[str, str] | None = None,
) -> int:
    """Save a sequence of a cache to a file, atomically: a crash leaves the old file or the complete new one.

    Args:
        path: the file; an existing one is replaced.
        cache: the cache that holds the sequence.
        sequence: the sequence to save.
        tokens: the sequence's token IDs, to be returned when the file is loaded.
        model: names and values that identify the model, such as a digest of its configuration.

    Returns:
        The size of the file in bytes.

    Raises:
        CacheFileError: the file cannot be written. An existing file is left unchanged.
        TypeError: a token is not a whole number.
        ValueError: the number of tokens is not the length of the sequence.
    """
    (sequence,) = whole(sequence=sequence)
    return prepare([cache], sequence, tokens, model).write(path)


def load(
    path: str | PathLike[str],
    cache: PlanningCache,
    sequence: int,
    model: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Opened:
    """Load a saved sequence into a cache, in place of the sequence's contents.

    The cache must be of the saved kind; its capacity, dtype and quantization may differ. The file must hold
    all layers that the cache has. An unused cache has no layers yet and takes those of the file; a layer
    that is added later reads zeros for the loaded tokens. All arrays are evaluated, so any thread may use
    the cache.

    Args:
        path: the file.
        cache: the cache to load into.
        sequence: the sequence to replace.
        model: names and values that identify the model. A file that differs in one of them is refused.
        verify: compare the checksums of all arrays. The header is always verified.

    Returns:
        The contents of the file, such as `tokens`.

    Raises:
        CacheFileError: the file cannot be read, is corrupt, or does not fit the cache or the model.
        CacheFullError: the sequence does not fit the capacity. The cache is unchanged in both cases.
    """
    cache._check_ready()
    (sequence,) = whole(sequence=sequence)
    opened = open_file(path, verify)
    opened.check_model(model or {})
    [snapshot] = opened.snapshots([cache])
    with faults_of(opened.path):
        plan = cache._plan_restore(sequence, snapshot)
    plan.commit()
    evaluate([cache], sequence)
    return opened
