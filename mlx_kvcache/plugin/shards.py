"""Files of a cache that several ranks hold: each writes its own, and its name and head tell whose it is."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CacheFileError
from ..persist.checks import integer, mapping
from ..persist.files import Opened, Prepared, faults_of
from .ranks import Ranks

_RANKS = "ranks"
_NAMED = re.compile(r"\.rank\d+of\d+(\.[^.]*)?")


def path_of(path: Path, ranks: Ranks) -> Path:
    """`chat.safetensors` is `chat.rank0of2.safetensors` for the first of two ranks.

    Raises:
        CacheFileError: the path names a rank already.
    """
    if ranks.is_alone:
        return path
    if _NAMED.search(path.name):
        raise CacheFileError(
            path, "the name of one rank's file, give the name without it: all ranks have one"
        )
    return path.with_name(f"{path.stem}.rank{ranks.rank}of{ranks.size}{path.suffix}")


def write(ranks: Ranks, path: Path, prepare: Callable[[], Prepared]) -> None:
    """Write every rank's file, or leave those that there are.

    All write beside their files first, and tell each other when that is on the disk. Only then each
    takes its place. Where a machine ends between these, or a rename fails, some ranks have the new
    file and some the old one; `load` tells such files apart by the name of the save.

    Raises:
        CacheFileError: it cannot be written.
        RanksDisagreeError: another rank's cannot.
        ValueError: as `prepare`.
    """
    ranks.agree(f"save {path.name}")
    with ranks.together(f"copy what is to be saved in {path.name}"):
        own = path_of(path, ranks)
        prepared = prepare()
    name = ranks.share("give the save a name", secrets.token_hex(8))[0]
    prepared.header["options"][_RANKS] = {"rank": ranks.rank, "size": ranks.size, "save": name}
    failure: CacheFileError | None = None
    is_written = False

    def ready() -> None:
        nonlocal is_written
        ranks.ready()
        is_written = True

    with ranks.together(f"write {path.name}"):
        try:
            prepared.write(own, ready)
        except CacheFileError as error:
            if not is_written:
                raise
            failure = error
    with ranks.together(f"put the new {path.name} in the place of the old one"):
        if failure:
            raise failure


def check_rank(opened: Opened, ranks: Ranks) -> str:
    """The name of the save that a file is of. Raises CacheFileError where it is another rank's."""
    with faults_of(opened.path):
        told: Mapping[str, Any] = mapping(opened.options.get(_RANKS, {}), "the ranks")
        rank, size = integer(told.get("rank", 0), "the rank"), integer(told.get("size", 1), "the ranks")
        if (rank, size) != (ranks.rank, ranks.size):
            raise ValueError(f"of rank {rank} of {size}, and this is rank {ranks.rank} of {ranks.size}")
    return str(told.get("save"))
