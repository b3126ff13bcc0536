"""Files of caches of every kind, whose checksums are right and whose contents are not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import mlx.core as mx
from hypothesis import strategies as st

from mlx_kvcache import CacheError, CacheFileError, CacheFullError
from mlx_kvcache.caches.base import PlanningCache
from mlx_kvcache.persist import load

from .blobs import own_file
from .bounds import bounded, file_of
from .damage import Edit, array_edits, edited, edited_arrays, edits
from .samples import feed, samples
from .target import drawn


class Damaged(NamedTuple):
    """A file of a kind, loaded into a cache of another or the same."""

    source: str
    target: str
    header: list[Edit]
    arrays: list[Edit]
    is_begun: bool
    verify: bool


def _damaged() -> st.SearchStrategy[Damaged]:
    names = st.sampled_from(list(samples()))
    return names.flatmap(
        lambda name: st.builds(
            Damaged,
            st.just(name),
            st.just(name) | st.just(name) | st.just(name) | names,
            edits,
            array_edits,
            st.booleans(),
            st.booleans(),
        )
    )


def state_of(cache: Any) -> list[Any]:
    """All bookkeeping of a cache, to compare."""
    found: list[Any] = []
    for child in getattr(cache, "_children", [cache]):
        table = getattr(child, "_table", None)
        if table is not None:
            found.append((dict(table.sequences), table.live, dict(table.capacity), set(table.packed)))
            found.append({layer: buffers.form for layer, buffers in child._store.layers.items()})
        else:
            found.append(dict(child._streams))
            found.append(dict(getattr(child, "_forms", {})))
    return [*found, cache.nbytes]


def check_damaged(damaged: Damaged) -> None:
    """It is refused and nothing has changed, or what is loaded can be used."""
    sample, cache = samples()[damaged.source], samples()[damaged.target].make()
    if damaged.is_begun:
        feed(cache, 5, sequence=1)
    data = own_file(edited(sample.header, damaged.header), edited_arrays(sample.arrays, damaged.arrays))
    path, before = file_of(data), state_of(cache)
    try:
        with bounded(len(data)):
            load(path, cache, 0, verify=damaged.verify)
    except (CacheFileError, CacheFullError):
        cache.check()
        assert state_of(cache) == before
        return
    assert path.read_bytes() == data
    cache.check()
    use(cache)


def use(cache: PlanningCache) -> None:
    """Ask of a loaded sequence what can be asked, and go on with it as far as it says it can."""
    end = cache.end(0)
    assert cache.nbytes >= 0
    for position in range(min(end, 40) + 2):
        cache.can_resume(0, position)
    mx.eval([array for child in getattr(cache, "_children", [cache]) for array in _arrays(child)])
    if cache.can_resume(0, end):
        # The file may have other layers or heads than are fed.
        with suppress(CacheError, ValueError):
            feed(cache, 2)
    for position in range(min(cache.end(0), 40), -1, -1):
        if cache.can_resume(0, position):
            cache.remove(0, position)
            assert cache.end(0) == position
            break
    cache.remove(0, 0)
    cache.check()
    assert cache.end(0) == 0


def _arrays(child: Any) -> list[mx.array]:
    store = getattr(child, "_store", None)
    return list(store.arrays) if store else []


SEQUENCES = drawn(
    "sequence",
    "damaged headers and arrays with right checksums, into a cache",
    st.deferred(_damaged),
    check_damaged,
)
