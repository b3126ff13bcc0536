"""What is let go is let go at once: nothing here waits for a garbage collection."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Many, PromptCache, attach, detach, make_prompt_cache, trial
from mlx_kvcache.plugin.hosts import observe
from mlx_kvcache.plugin.hosts.observe import PerModel
from mlx_kvcache.plugin.pool import pool
from mlx_kvcache.plugin.rope import probe
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_gpt2, tiny_llama

TOKENS = [(7 * i) % 90 for i in range(40)]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Only reference counting frees anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def filled(model: nn.Module, tokens: list[int] = TOKENS, **options: Any) -> PromptCache:
    cache = make_prompt_cache(model, **options)
    logits_of(model, cache, tokens)
    return cache


def merged(caches: list[PromptCache]) -> list[Any]:
    """A batch of forks, as mlx-lm makes one."""
    return [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]


def interrupted(model: nn.Module, cache: list[Any], rows: int = 1) -> None:
    """A call of the model that raises in its second layer."""
    layer = model.layers[1]
    kept, layer.mlp = layer.mlp, nn.Module()
    with pytest.raises(TypeError):
        model(mx.ones((rows, 3), mx.int32), cache=cache)
    layer.mlp = kept


def plain(model: nn.Module) -> Any:
    return filled(model)


def shifted(model: nn.Module) -> Any:
    cache = filled(model, capacity=50, overflow="shift")
    logits_of(model, cache, TOKENS, 10)
    return cache


def packed(model: nn.Module) -> Any:
    return filled(model, kv_bits=8, kv_group_size=32, quantize_after=20)


def batched(model: nn.Module) -> Any:
    caches = [filled(model), filled(model, TOKENS[:20])]
    batch = merged(caches)
    mx.eval(model(mx.array([[1], [2]]), cache=batch))
    return caches, batch, [entry.extract(1) for entry in batch]


def stopped(model: nn.Module) -> Any:
    cache = filled(model)
    interrupted(model, cache)
    return cache


def attached(model: nn.Module) -> Any:
    attach(model)
    return filled(model)


def many(model: nn.Module) -> Any:
    running = Many(model)
    running.add(TOKENS)
    running.add(TOKENS[:9])
    running.step()
    return running._pool


@pytest.mark.parametrize("use", [plain, shifted, packed, batched, stopped, attached, many])
def test_a_cache_does_not_keep_its_model_alive(use: Callable[[nn.Module], Any]) -> None:
    model = tiny_llama(hidden_size=128)
    weights = weakref.ref(model.model.layers[0])
    left = use(model)
    del model
    assert weights() is None
    del left


def test_no_recurrent_model_is_kept_alive_either() -> None:
    model = build("qwen3_next")
    left = filled(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert left.position == len(TOKENS)


def test_a_cache_whose_model_is_gone_says_so(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = filled(model)
    del model
    assert cache.pool.model is None
    assert (cache.position, len(repr(cache)) > 0, cache.nbytes > 0) == (40, True, True)
    assert cache.fork().position == 40
    with pytest.raises(CacheError, match=r"model of this prompt cache .* has been freed"):
        cache.save(tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match=r"model of this prompt cache .* has been freed"):
        cache.remove(3, 9)
    other = tiny_gpt2()
    own = make_prompt_cache(other)
    with pytest.raises(ValueError, match=r"another model, a mlx_lm.models.llama, .* mlx_lm.models.gpt2"):
        other(mx.array([[1]]), cache=cache)
    assert cache.position == 40
    cache.rewind(3)
    cache.close()
    assert own.position == cache.pool.nbytes == 0


def test_what_is_known_of_a_model_is_not_believed_of_the_next_at_its_address() -> None:
    first, second, gone = tiny_llama(), tiny_llama(), list[str]()
    values = PerModel(lambda: list[int](), gone=lambda: gone.append("one"))
    values.of(first).append(1)
    # As if the second had been made where the first was, and nobody had noticed that that died.
    values._entries[id(second)] = values._entries[id(first)]
    assert values.get(second) is None
    assert values.of(second) == [] and values.of(second) is values.get(second)
    assert values.of(first) == [1] and values and not gone
    del first
    assert gone == ["one"] and not values and list(values._entries) == [id(second)]
    assert values.get(tiny_llama()) is None


def test_nothing_is_known_of_a_model_that_is_gone() -> None:
    model = tiny_llama()
    left = filled(model, capacity=50, overflow="shift")
    attach(model)
    tables: list[PerModel[Any]] = [observe._users, pool._pools, trial._findings, probe._schemes]
    tables.append(sys.modules[attach.__module__]._attached)
    key = id(model)
    assert all(key in table._entries for table in tables)
    del model
    assert not any(key in table._entries for table in tables)
    assert left.position == 40


def test_closing_gives_the_memory_back() -> None:
    model = tiny_llama(hidden_size=128)
    kept, cache = filled(model), make_prompt_cache(model)
    mx.synchronize()
    before = mx.get_active_memory()
    logits_of(model, cache, TOKENS * 20, 40)
    assert mx.get_active_memory() > before + 100_000
    cache.close()
    assert mx.get_active_memory() <= before
    assert kept.position == 40


def test_closing_in_the_middle_of_a_forward_waits_for_its_end() -> None:
    """Of layers that somebody drives by hand, whose cells are in use."""
    model = tiny_llama()
    busy, other = filled(model), filled(model)
    keys = mx.zeros((1, 2, 1, 8))
    busy[0].update_and_fetch(keys, keys)
    other.close()
    for layer in busy[1:]:
        layer.update_and_fetch(keys, keys)
    assert busy.position == 41
    held = busy.pool.nbytes
    busy.close()
    assert held > 0 and busy.pool.nbytes == 0


def test_a_cache_that_is_closed_in_its_own_forward_hinders_no_other() -> None:
    model = tiny_llama()
    broken, other = filled(model), filled(model)
    keys = mx.zeros((1, 2, 1, 8))
    broken[0].update_and_fetch(keys, keys)
    broken.close()
    logits_of(model, other, TOKENS)
    assert other.position == 80
    other.close()
    assert other.pool.nbytes == 0


def forked(model: nn.Module, cache: PromptCache) -> None:
    logits_of(model, cache.fork(), TOKENS)
    logits_of(model, copy.deepcopy(cache), TOKENS)


def merging(model: nn.Module, cache: PromptCache) -> None:
    batch = merged([cache.fork(), cache.fork()])
    mx.eval(model(mx.array([[1], [2]]), cache=batch))


def merging_one_layer(model: nn.Module, cache: PromptCache) -> None:
    """The other layers are never told."""
    first, second = cache.fork(), cache.fork()
    first[0].merge([first[0], second[0]])
    cache[0].merge([cache[0], first[0]])
    cache[1].extract(0)


def extending(model: nn.Module, cache: PromptCache) -> None:
    one, two = merged([cache]), merged([filled(model)])
    for ours, theirs in zip(one, two, strict=True):
        ours.extend(theirs)
    mx.eval(model(mx.array([[1], [2]]), cache=one))


def extending_one_layer(model: nn.Module, cache: PromptCache) -> None:
    one, two = merged([cache]), merged([filled(model)])
    one[0].extend(two[0])


def filtering(model: nn.Module, cache: PromptCache) -> None:
    batch = merged([cache, cache, filled(model)])
    for entry in batch:
        entry.filter([0, 0])
    mx.eval(model(mx.array([[1], [2]]), cache=batch))


def extracting(model: nn.Module, cache: PromptCache) -> None:
    batch = merged([cache, filled(model)])
    mx.eval(model(mx.array([[1], [2]]), cache=batch))
    logits_of(model, [entry.extract(1) for entry in batch], TOKENS)


def raising(model: nn.Module, cache: PromptCache) -> None:
    interrupted(model, cache.fork())
    interrupted(model, merged([cache, cache]), rows=2)


def refusing(model: nn.Module, cache: PromptCache) -> None:
    small = make_prompt_cache(model, capacity=5)
    with pytest.raises(CacheError):
        logits_of(model, small, TOKENS)
    with pytest.raises(ValueError):
        cache[0].merge([cache[0], make_prompt_cache(model, kv_bits=4, kv_group_size=32)[0]])
    other = make_prompt_cache(tiny_gpt2())
    with pytest.raises(ValueError):
        model(mx.array([[1]]), cache=other)


def loading(model: nn.Module, cache: PromptCache) -> None:
    path = Path(str(model.folder)) / "a.safetensors"
    cache.save(path)
    logits_of(model, PromptCache.load(path, model), TOKENS)
    cache.save(path, format="mlx-lm")
    logits_of(model, PromptCache.load(path, model), TOKENS)


def attaching(model: nn.Module, cache: PromptCache) -> None:
    with attach(model):
        filled(model)


USES = [
    forked, merging, merging_one_layer, extending, extending_one_layer, filtering, extracting, raising,
    refusing, loading, attaching,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_what_is_dropped_leaves_nothing_behind(
    use: Callable[[nn.Module, PromptCache], None], tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=128)
    model.folder = tmp_path
    cache = filled(model)
    # What a model is like is found out once.
    use(model, cache)
    cache.rewind_to(40)
    mx.synchronize()
    before, finalizers, gone = cache.pool.nbytes, registered(), weakref.ref(model)
    use(model, cache)
    cache.rewind_to(40)
    assert cache.pool.nbytes == before
    assert registered() == finalizers
    del model
    assert gone() is None


def registered() -> int:
    """How many finalizers Python keeps."""
    return len(weakref.finalize._registry)  # type: ignore[attr-defined]


def test_a_pool_goes_with_its_last_cache() -> None:
    model = tiny_llama()
    original, finalizers = type(model), registered()
    cache = filled(model)
    batch = merged([cache, cache])
    mx.eval(model(mx.array([[1], [2]]), cache=batch))
    own = weakref.ref(cache.pool)
    del cache
    assert own() is not None
    del batch
    assert own() is None
    assert type(model) is original
    assert registered() == finalizers


def test_attaching_again_and_again_leaves_nothing() -> None:
    model = tiny_llama()
    with attach(model):
        pass
    finalizers = registered()
    for _ in range(20):
        attach(model)
        attach(model, capacity=9)
        detach(model)
        detach(model)
    assert registered() == finalizers
