"""Sequences of caches as files: written whole or not at all, and believed only as far as checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..arguments import whole
from ..caches.base import PlanningCache
from ..errors import CacheFileError
from . import container
from .schema import as_stored, decode, encode, integer, listing, load_arrays, mapping, shaped

_TOKENS = "tokens"


class Prepared(NamedTuple):
    """What is to be written, in memory that is not MLX's: any thread may write it."""

    header: dict[str, Any]
    arrays: dict[str, container.Stored]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(stored.data.nbytes for stored in self.arrays.values())

    def write(self, path: str | PathLike[str], ready: Callable[[], None] = lambda: None) -> int:
        """Write it, and return the bytes. Raises CacheFileError; what was there still is.

        Args:
            ready: called when all is on the disk, before it takes the place of what is there.
        """
        return container.write(Path(path), self.header, self.arrays, ready)


def prepare(
    caches: Sequence[PlanningCache],
    sequence: int,
    tokens: Sequence[int] | None = None,
    model: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, mx.array] | None = None,
) -> Prepared:
    """Copy what caches hold of a sequence, without what is unused in their buffers. Evaluates it.

    Args:
        tokens: the sequence's; as many as it is long.
        model: what tells the model from others, by what is compared.
        options: anything that JSON can hold.
        extra: more arrays, by names that begin with a letter.

    Raises:
        ValueError: another number of tokens than the sequence is long, or ones outside [0, 2**63).
    """
    end = caches[0]._end(sequence)
    if tokens is not None and len(tokens) != end:
        raise ValueError(f"{len(tokens)} tokens for a sequence of {end}")
    try:
        numbers = None if tokens is None else [index(token) for token in tokens]
    except TypeError as error:
        raise TypeError(f"tokens must be whole numbers: {error}") from error
    if outside := [token for token in numbers or () if not 0 <= token < 2**63]:
        raise ValueError(f"token {outside[0]} is negative, or not below 2**63")
    arrays = dict(extra or {})
    encoded = [encode(cache, sequence, arrays, f"{i}.") for i, cache in enumerate(caches)]
    if numbers is not None:
        arrays[_TOKENS] = mx.array(np.array(numbers, np.int64))
    header = {
        "end": end,
        "caches": encoded,
        "model": dict(model or {}),
        "options": dict(options or {}),
        "has_tokens": numbers is not None,
    }
    return Prepared(header, as_stored(arrays))


@dataclass(frozen=True)
class Opened:
    """A file that has been opened.

    Attributes:
        path: which.
        end: how many tokens it is for.
        model, options: as they were saved.
        tokens: where they were given.
        arrays: by name.
        is_verified: whether the arrays' checksums have been compared.
    """

    path: Path
    end: int
    model: dict[str, Any]
    options: dict[str, Any]
    tokens: list[int] | None
    arrays: dict[str, mx.array] = field(repr=False)
    is_verified: bool
    _caches: list[Any] = field(repr=False)

    def check_model(self, model: Mapping[str, str]) -> None:
        """Raise CacheFileError where the file tells of another model, in what both of them tell."""
        for name, value in model.items():
            if self.model.get(name, value) != value:
                raise CacheFileError(
                    self.path,
                    f"of another model: its {name} is {self.model[name]}, this one's is {value}; "
                    f"load it with what it was saved with",
                )

    def snapshots(self, caches: Sequence[PlanningCache]) -> list[Any]:
        """For each cache what is to be restored. Raises CacheFileError where it does not fit them."""
        with faults_of(self.path):
            told = listing(self._caches, "the caches", len(caches))
            pairs = enumerate(zip(caches, told, strict=True))
            found = [decode(cache, part, self.arrays, f"{i}.") for i, (cache, part) in pairs]
            for snapshot in found:
                check_end(snapshot, self.end)
        return found


def check_end(snapshot: Any, end: int) -> None:
    """Raise ValueError unless a snapshot, or all of several, are of so many tokens."""
    if isinstance(snapshot, list):
        for child in snapshot:
            check_end(child, end)
    elif (snapshot.end if snapshot else 0) != end:
        raise ValueError(f"its caches hold {snapshot.end if snapshot else 0} and {end} tokens")


def open_file(path: str | PathLike[str], verify: bool = True, lazy: bool = False) -> Opened:
    """Read a file.

    Args:
        verify: compare the checksums of all arrays. Otherwise damage in them goes unseen; the header
            is always verified.
        lazy: with `verify=False`, read an array when it is first needed, which only this thread can.

    Raises:
        NotOursError: a safetensors file of another writer.
        CacheFileError: it cannot be read, is damaged, or its header is none of a cache.
    """
    contents = container.read_contents(Path(path))
    arrays = load_arrays(contents, verify, lazy)
    with faults_of(contents.path):
        header = contents.header
        end = integer(header.get("end"), "the end")
        tokens = None
        if header.get("has_tokens") is True:
            found: Any = shaped(arrays, _TOKENS, (end,), mx.int64).tolist()
            tokens = [integer(token, "a token", 0, 2**63 - 1) for token in found]
        return Opened(
            contents.path,
            end,
            mapping(header.get("model"), "the model"),
            mapping(header.get("options"), "the options"),
            tokens,
            arrays,
            verify,
            listing(header.get("caches"), "the caches"),
        )


def evaluate(caches: Sequence[PlanningCache], sequence: int) -> None:
    """Compute what caches hold of a sequence, so that other threads than this one can use it."""
    arrays: dict[str, mx.array] = {}
    for i, cache in enumerate(caches):
        encode(cache, sequence, arrays, f"{i}.")
    mx.eval(list(arrays.values()))


@contextmanager
def faults_of(path: Path, *more: type[Exception]) -> Iterator[None]:
    """ValueErrors inside, and errors of the other kinds that are given, are faults of a file."""
    kinds: tuple[type[Exception], ...] = (ValueError, *more)
    try:
        yield
    except kinds as error:
        raise CacheFileError(path, str(error)) from error


def save(
    path: str | PathLike[str],
    cache: PlanningCache,
    sequence: int,
    tokens: Sequence[int] | None = None,
    model: Mapping[str, str] | None = None,
) -> int:
    """Save what a cache holds of a sequence; the file is there whole or not at all.

    Args:
        tokens: the sequence's, for whoever loads it.
        model: what tells the model from others, such as a digest of its configuration.

    Returns:
        Bytes of the file.

    Raises:
        CacheFileError: it cannot be written; a file that was there still is.
        ValueError: another number of tokens than the sequence is long.
    """
    cache._check_ready()
    (sequence,) = whole(sequence=sequence)
    return prepare([cache], sequence, tokens, model).write(path)


def load(
    path: str | PathLike[str],
    cache: PlanningCache,
    sequence: int,
    model: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Opened:
    """Make a sequence what was saved. The cache may be of another capacity, and store otherwise.

    The file must hold all layers that the cache has. A cache that nothing was ever put into has none
    yet: it takes those of the file, and one that is put later reads zeros for what was loaded. What is
    loaded is in memory, and can be used from any thread.

    Args:
        model: refuses a file that says otherwise.
        verify: as of `open_file`.

    Raises:
        CacheFileError: the file cannot be read, is damaged, or does not fit the cache or the model.
        CacheFullError: there is no room. The cache is unchanged in either case.
    """
    cache._check_ready()
    (sequence,) = whole(sequence=sequence)
    opened = open_file(path, verify)
    opened.check_model(model or {})
    snapshots = opened.snapshots([cache])
    with faults_of(opened.path):
        plan = cache._plan_restore(sequence, snapshots[0])
    plan.commit()
    evaluate([cache], sequence)
    return opened
