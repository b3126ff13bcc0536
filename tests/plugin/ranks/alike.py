"""Ranks do what one process does."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import Many, PromptCache, attach, make_prompt_cache, make_session_pool
from tests.plugin.ranks.setting import TOLERANCE, Pair, Setting, split
from tests.plugin.tiny import tiny_llama

PROMPT = [(7 * i + i * i) % 90 + 1 for i in range(20)]


def _edits(setting: Setting, way: str) -> None:
    pair = setting.pair(way)
    pair.feed(PROMPT[:13])
    pair.feed(PROMPT[13:])
    pair.feed([5])
    pair.feed([6])
    pair.whole.rewind(6)
    pair.cache.rewind(6)
    pair.feed([7])
    branch = pair.fork()
    branch.feed([8, 9])
    pair.feed([10])
    pair.whole.remove(3, 8)
    pair.cache.remove(3, 8)
    pair.feed([11])
    branch.feed([12])
    _check_share(setting, way, pair)
    path = setting.folder / f"{way}.safetensors"
    pair.cache.save(path, tokens=list(range(pair.cache.position)))
    loaded = PromptCache.load(path, pair.model, group=setting.group)
    assert loaded.tokens == list(range(pair.cache.position)) and loaded.nbytes == pair.cache.nbytes
    Pair(pair.whole_model, pair.model, pair.whole.fork(), loaded, pair.tolerance).feed([13])
    own = path.with_name(f"{way}.rank{setting.rank}of{setting.group.size()}.safetensors")
    assert own.exists() and not path.exists()


def _check_share(setting: Setting, way: str, pair: Pair) -> None:
    """Each rank holds its heads or its layers, and nothing else."""
    size, layers = setting.group.size(), [entry.nbytes for entry in pair.whole]
    if way == "tensor":
        assert pair.cache.nbytes * size == pair.whole.nbytes
        assert pair.cache.pool.nbytes * size == pair.whole.pool.nbytes
    else:
        own = len(layers) // size
        # Rank 0 has the last layers.
        first = len(layers) - own * (setting.rank + 1)
        assert [entry.nbytes for entry in pair.cache] == layers[first : first + own]


def tensor_edits(setting: Setting) -> None:
    _edits(setting, "tensor")


def pipeline_edits(setting: Setting) -> None:
    _edits(setting, "pipeline")


def splices(setting: Setting) -> None:
    """Runs join in the middle of a block and after it, also in a fork, on each rank's heads or layers."""
    for way in ("tensor", "pipeline"):
        pair = setting.pair(way)
        before = [*PROMPT, *range(1, 9)]
        pair.feed(before)
        after = [*before[:3], 91, 92, *before[6:14], 93, *before[18:], 94]
        splice, own = (cache.splice(before, after, 4) for cache in (pair.whole, pair.cache))
        assert own == splice and splice.moved == 18
        pair.feed(splice.rest[:1])
        branch = pair.fork()
        for each in (pair, branch):
            each.feed(splice.rest[1:])
            assert each.cache.position == len(after)
            each.feed([7])
        pair.whole.splice([*after, 7], [5, *before], 4)
        pair.cache.splice([*after, 7], [5, *before], 4)
        pair.cache.end_splice()
        pair.whole.end_splice()
        pair.feed([6])


def _generation(setting: Setting, way: str) -> None:
    """mlx-lm's loop has the next step under way when it is left, on a stream of its own."""
    pair = setting.pair(way, capacity=24, overflow="shift", sinks=2)
    prompt = mx.array(PROMPT)
    for _ in range(2):
        steps = [
            [token for token, _ in islice(generate_step(prompt, model, max_tokens=-1, prompt_cache=cache), 9)]
            for model, cache in ((pair.whole_model, pair.whole), (pair.model, pair.cache))
        ]
        assert steps[0] == steps[1]
        assert pair.whole.position == pair.cache.position
        pair.whole.rewind(3)
        pair.cache.rewind(3)
        pair.feed([5, 6])
        prompt = mx.array([7, 8, 9])


def tensor_generation(setting: Setting) -> None:
    _generation(setting, "tensor")


def pipeline_generation(setting: Setting) -> None:
    _generation(setting, "pipeline")


def in_fewer_bits(setting: Setting) -> None:
    """Heads are packed each for itself, so ranks store what one process stores."""
    whole = tiny_llama(num_key_value_heads=4, num_hidden_layers=1, head_dim=32)
    part = split(copy.deepcopy(whole), "tensor", setting.group)
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}
    caches = make_prompt_cache(whole, **options), make_prompt_cache(part, group=setting.group, **options)
    pair = Pair(whole, part, *caches, TOLERANCE["tensor"])
    pair.feed(PROMPT)
    pair.whole.remove(2, 5)
    pair.cache.remove(2, 5)
    pair.feed([3])
    assert pair.cache.nbytes * setting.group.size() == pair.whole.nbytes


def attached(setting: Setting) -> None:
    """mlx-lm's own tools get caches that agree."""
    _, part = setting.models("tensor")
    with attach(part, group=setting.group):
        tokens = [token for token, _ in generate_step(mx.array(PROMPT), part, max_tokens=3)]
    cache = make_prompt_cache(part, group=setting.group)
    again = [token for token, _ in generate_step(mx.array(PROMPT), part, max_tokens=3, prompt_cache=cache)]
    assert tokens == again


def one_batch(setting: Setting) -> None:
    """Rows that join and leave, as mlx-lm batches them."""
    pair = setting.pair("tensor")
    pair.feed(PROMPT[:5])
    other = pair.fork()
    other.feed([3, 4])
    found = []
    for model, rows in (
        (pair.whole_model, [pair.whole, other.whole]),
        (pair.model, [pair.cache, other.cache]),
    ):
        batch = [first.merge([first, second]) for first, second in zip(*rows, strict=True)]
        logits = model(mx.array([[5], [6]]), cache=batch)
        for entry in batch:
            entry.filter([1])
        found.append((logits, model(mx.array([[7]]), cache=batch)))
        mx.eval(found[-1])
    for expected, own in zip(*found, strict=True):
        assert mx.allclose(own, expected, atol=pair.tolerance).item()


def not_offered(setting: Setting) -> None:
    """What each rank would decide by what it has room for is refused on all of them."""
    _, part = setting.models("tensor")
    for make in (make_session_pool, Many):
        try:
            make(part, group=setting.group)
        except NotSupportedError:
            continue
        raise AssertionError(make)


def a_group_of_one(setting: Setting) -> None:
    """Nothing is compared where there is nobody to compare with."""
    whole, _ = setting.models("tensor")
    alone = mx.distributed.init(backend="mpi")
    assert alone.size() == 1
    assert make_prompt_cache(whole, group=alone).pool is make_prompt_cache(whole).pool
