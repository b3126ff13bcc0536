"""Ranks that are about to do different things are told so, all of them, and go on unharmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import CacheFileError, CacheFullError, NotSupportedError, RanksDisagreeError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.ranks.setting import Pair, Setting


def _told(kind: type[Exception], act: Callable[[], Any], *words: str) -> Exception:
    """The error of just this class that something raises, with these words in its message."""
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind, repr(caught.value)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return caught.value


def _step(pair: Pair, *tokens: int) -> Callable[[], Any]:
    """A call of the model, not made yet."""
    return partial(pair.model, mx.array([tokens]), cache=pair.cache)


@contextmanager
def _unharmed(pair: Pair) -> Iterator[None]:
    """Whatever happens inside leaves a conversation as it was: it goes on as in one process."""
    before = pair.cache.position, pair.cache.nbytes
    yield
    assert (pair.cache.position, pair.cache.nbytes) == before
    pair.feed([9])
    pair.feed([4, 2])


def other_options(setting: Setting) -> None:
    _, part = setting.models("tensor")
    own = 50 + setting.rank
    error = _told(
        RanksDisagreeError,
        lambda: make_prompt_cache(part, capacity=own, group=setting.group),
        "capacity=50",
        "capacity=51",
    )
    assert isinstance(error, RanksDisagreeError) and len(error.told) == setting.group.size()


def other_numbers_of_tokens(setting: Setting) -> None:
    for way in ("tensor", "pipeline"):
        pair = setting.pair(way)
        pair.feed([1, 2, 3])
        with _unharmed(pair):
            _told(
                RanksDisagreeError,
                _step(pair, *[5] * (2 if setting.rank else 3)),
                "rank 0 is about to take in 3 tokens at 3",
                "about to take in 2 tokens at 3",
            )


def other_prompts(setting: Setting) -> None:
    pair = setting.pair("tensor")
    with _unharmed(pair):
        _told(RanksDisagreeError, _step(pair, 7, setting.rank), "[7, 0]", "[7, 1]")
        _told(RanksDisagreeError, _step(pair, *range(40), setting.rank), "of 41 tokens with digest")


def other_samples(setting: Setting) -> None:
    """A token is compared a step later; until then it is in the caches, and can be rewound."""
    pair = setting.pair("tensor")
    pair.feed([1, 2, 3])
    mx.eval(_step(pair, setting.rank)())
    _told(
        RanksDisagreeError,
        _step(pair, 5),
        "rank 0 was fed [0] at 3",
        "fed [1] at 3",
        "can be rewound",
    )
    assert pair.cache.position == 4
    pair.cache.rewind_to(3)
    pair.feed([9])


def other_calls(setting: Setting) -> None:
    """An edit here and a step there."""
    for way in ("tensor", "pipeline"):
        pair = setting.pair(way)
        pair.feed([1, 2, 3, 4, 5])
        others: list[Callable[[], Any]] = [
            partial(pair.cache.rewind, 1),
            partial(pair.cache.remove, 1, 2),
            pair.cache.fork,
            pair.cache.close,
            partial(pair.cache.can_resume, 2),
            partial(pair.cache.save, setting.folder / "never.safetensors"),
        ]
        for other in others:
            with _unharmed(pair):
                act = other if setting.is_last else _step(pair, 5)
                _told(RanksDisagreeError, act, "about to take in 1 tokens at")
    assert not list(setting.folder.glob("never*"))


def other_edits(setting: Setting) -> None:
    pair = setting.pair("tensor")
    pair.feed([1, 2, 3, 4, 5, 6])
    with _unharmed(pair):
        n = 1 + setting.rank
        _told(RanksDisagreeError, lambda: pair.cache.rewind(n), "rewind to 5", "rewind to 4")
        _told(RanksDisagreeError, lambda: pair.cache.remove(0, n), "remove [0, 1)", "remove [0, 2)")
    branches = [pair.cache.fork() for _ in range(2)]
    with _unharmed(pair):
        own = branches[min(1, setting.rank)]
        _told(RanksDisagreeError, lambda: own.rewind(1), "of conversation")


def other_splices(setting: Setting) -> None:
    """Ranks that would keep other tokens, although as many come before and after."""
    pair, text = setting.pair("tensor"), list(range(1, 41))
    pair.feed(text)
    with _unharmed(pair):
        after = [*text[:9], 50 + setting.rank, *text[12:]]
        _told(
            RanksDisagreeError, lambda: pair.cache.splice(text, after, 8), "splice 40 tokens to 38", "digest"
        )
        after[9] = 50
        _told(
            RanksDisagreeError,
            lambda: pair.cache.splice(text, after, 8 + setting.rank),
            "min_run=8",
            "min_run=9",
        )


class _Fault(Exception):
    pass


def a_fault_of_one_rank(setting: Setting) -> None:
    """A model that raises on one rank, between its layers."""
    for way in ("tensor", "pipeline"):
        pair = setting.pair(way)
        pair.feed([1, 2, 3])
        layer = pair.cache[-1]
        update, is_faulty = layer.update_and_fetch, setting.is_last
        with _unharmed(pair):
            if is_faulty:
                layer.update_and_fetch = _raise
            try:
                for tokens in ([5], [5, 6]):
                    kind = _Fault if is_faulty else RanksDisagreeError
                    _told(kind, _step(pair, *tokens), "of one rank" if is_faulty else "_Fault: of one rank")
            finally:
                layer.update_and_fetch = update


def _raise(*_: Any) -> Any:
    raise _Fault("of one rank")


def no_room(setting: Setting) -> None:
    """What no rank can do is each rank's own error."""
    pair = setting.pair("tensor", capacity=8)
    pair.feed([1, 2, 3, 4])
    with _unharmed(pair):
        _told(CacheFullError, _step(pair, *[5] * 5), "5 cells needed")
        _told(NotSupportedError, lambda: pair.cache.save("x.safetensors", format="mlx-lm"))


def a_full_disk(setting: Setting) -> None:
    """One rank cannot write: every rank keeps the file that it had."""
    pair = setting.pair("tensor")
    pair.feed([1, 2, 3])
    path = setting.folder / f"disk{setting.rank}" / "chat.safetensors"
    path.parent.mkdir()
    pair.cache.save(path)
    pair.feed([4])
    own = _own(setting, path)
    before = own.read_bytes()
    blocked = path if not setting.is_last else setting.folder / "nowhere" / "chat.safetensors"
    with _unharmed(pair):
        kind = CacheFileError if setting.is_last else RanksDisagreeError
        _told(kind, lambda: pair.cache.save(blocked), "cannot")
    assert own.read_bytes() == before and list(path.parent.iterdir()) == [own]


def files_of_others(setting: Setting) -> None:
    """Files that do not belong together, or not here."""
    pair = setting.pair("tensor")
    _, part = setting.models("tensor")
    pair.feed([1, 2, 3])
    first, second = (setting.folder / f"{name}.safetensors" for name in ("first", "second"))
    pair.cache.save(first)
    pair.cache.save(second)

    def load(path: Path, group: Any = setting.group) -> PromptCache:
        return PromptCache.load(path, part, group=group)

    own, other = _own(setting, first), _own(setting, second)
    named = first.with_name("first.rank0of2.safetensors")
    _told(CacheFileError, lambda: load(named), "file of one rank")
    _told(
        CacheFileError, lambda: load(own, None), f"belongs to rank {setting.rank} of {setting.group.size()}"
    )
    contents = other.read_bytes()
    if setting.is_last:
        other.write_bytes(own.read_bytes())
    _told(RanksDisagreeError, lambda: load(second), "of save")
    damaged = bytearray(contents)
    damaged[-100] ^= 1
    other.write_bytes(damaged if setting.is_last else contents)
    _told(CacheFileError if setting.is_last else RanksDisagreeError, lambda: load(second), "checksum")
    if setting.is_last:
        other.unlink()
    _told(CacheFileError if setting.is_last else RanksDisagreeError, lambda: load(second), "No such file")
    pair.cache.save(second)
    if setting.rank == 1:
        other.write_bytes(second.with_name(f"second.rank0of{setting.group.size()}.safetensors").read_bytes())
    _told(
        CacheFileError if setting.rank == 1 else RanksDisagreeError,
        lambda: load(second),
        "belongs to rank 0 of",
    )
    pair.cache.save(second)
    assert load(second).position == pair.cache.position


def _own(setting: Setting, path: Path) -> Path:
    return path.with_name(f"{path.stem}.rank{setting.rank}of{setting.group.size()}{path.suffix}")
