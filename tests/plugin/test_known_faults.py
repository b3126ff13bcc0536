"""Faults that other MLX caches have had, and that must not be here.

Where layers are driven by hand, a token's keys and values are its position, so that a wrong
cell names itself.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.models.cache import (
    make_prompt_cache as make_theirs,
)

from mlx_kvcache import CacheFullError, NotSupportedError
from mlx_kvcache.plugin import attach, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + i * i) % 97 for i in range(200)]


def windowed(kinds: str = "w", window: int = 8, keep: int = 0) -> nn.Module:
    """A small model: w is a layer with a window, f one of full attention."""
    names: dict[str, str] = {"w": "sliding_attention", "f": "full_attention"}
    types: dict[str, Any] = (
        {"layer_types": [names[kind] for kind in kinds], "sliding_window": window} if "f" in kinds else {}
    )
    model = tiny_llama(num_hidden_layers=len(kinds), **types)
    model.make_cache = lambda: [RotatingKVCache(window, keep) if kind == "w" else KVCache() for kind in kinds]
    return model


def coded(*rows: list[int]) -> mx.array:
    return mx.broadcast_to(mx.array(rows, mx.float32)[:, None, :, None], (len(rows), 2, len(rows[0]), 8))


def fed(cache: Any, positions: list[int]) -> list[int]:
    """Store tokens in every layer, and return what the last one gives."""
    for layer in cache:
        layer.make_mask(len(positions))
    for layer in cache:
        keys, values = layer.update_and_fetch(coded(positions), coded(positions))
        assert mx.array_equal(keys, values)
    return held(keys)


def held(keys: mx.array, row: int = 0) -> list[int]:
    numbers = keys[row, 0, :, 0].tolist()
    assert isinstance(numbers, list)
    return [int(number) for number in numbers if isinstance(number, float)]


@pytest.mark.parametrize("steps", [17, 20])
def test_a_window_that_has_slid_is_trimmed_exactly(steps: int) -> None:
    cache = make_prompt_cache(windowed())
    for position in range(steps):
        fed(cache, [position])
    assert cache[0].trim(3) == 3
    assert fed(cache, [steps - 3]) == list(range(steps - 10, steps - 2))


def test_trimming_goes_through_all_layers_or_none() -> None:
    """A window of 8 beside full attention: 7 tokens, a block of 4, 3 back."""
    model = windowed("fw")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:7])
    logits_of(model, cache, TEXT[7:11])
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 3) == 3
    assert [layer.offset for layer in cache] == [8, 8]
    theirs = make_theirs(model)
    logits_of(model, theirs, TEXT[:8])
    assert (
        difference(logits_of(model, cache, TEXT[50:60], 1), logits_of(model, theirs, TEXT[50:60], 1)) <= 1e-5
    )


def test_a_trim_that_a_window_cannot_do_changes_no_layer() -> None:
    model = windowed("fw")
    cache = make_prompt_cache(model, rewind=4)
    logits_of(model, cache, TEXT[:40], 10)
    with pytest.raises(NotSupportedError, match="40 tokens to position 20"):
        trim_prompt_cache(cache, 20)
    assert [layer.offset for layer in cache] == [40, 40]
    assert cache.position == 40
    assert not cache.can_resume(20)


def test_a_chunk_is_resumed_only_where_its_head_is_held() -> None:
    """Full layers and chunks of 8: 24 tokens in blocks, back to the middle of the first chunk."""
    model = build("llama4")
    cache = make_prompt_cache(model, rewind=2)
    logits_of(model, cache, TEXT[:24], 6)
    with pytest.raises(NotSupportedError, match="24 tokens to position 4"):
        trim_prompt_cache(cache, 20)
    assert {layer.offset for layer in cache} == {24}
    assert cache.resume_point(13) == 8


def test_dropped_tokens_do_not_come_back() -> None:
    cache = make_prompt_cache(windowed("f"))
    fed(cache, [0, 1, 2, 3])
    cache[0].trim(2)
    assert fed(cache, [9]) == [0, 1, 9]


def merged(model: nn.Module, *lengths: int) -> Any:
    """A batch of prompt caches that hold so many tokens each."""
    caches = [make_prompt_cache(model) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        if length:
            fed(cache, list(range(length)))
    return caches[0][0].merge([cache[0] for cache in caches])


def test_filtering_a_batch_in_which_nothing_is_stored() -> None:
    batch = merged(windowed("f"), 0, 0)
    batch.prepare(left_padding=[1, 0])
    batch.filter([1])
    assert batch.offset.tolist() == [0]
    assert batch.make_mask(2) == "causal"
    keys, _ = batch.update_and_fetch(coded([0, 1]), coded([0, 1]))
    assert held(keys) == [0, 1]


@pytest.mark.parametrize("kind", ["w", "f"])
def test_filtering_in_the_middle_of_a_padded_prompt(kind: str) -> None:
    batch = merged(windowed(kind), 0, 0)
    batch.prepare(lengths=[4, 2], right_padding=[0, 2])
    batch.update_and_fetch(coded([0, 1], [0, 1]), coded([0, 1], [0, 1]))
    batch.filter([1])
    batch.update_and_fetch(coded([90, 91]), coded([90, 91]))
    batch.finalize()
    keys, _ = batch.update_and_fetch(coded([2]), coded([2]))
    assert held(keys) == [0, 1, 2]
    assert batch.offset.tolist() == [3]


def test_finalising_after_a_filter_brings_no_row_back() -> None:
    batch = merged(windowed("f"), 0, 0)
    batch.prepare(right_padding=[0, 2])
    batch.update_and_fetch(coded([0, 1, 2, 3], [0, 1, 90, 91]), coded([0, 1, 2, 3], [0, 1, 90, 91]))
    batch.filter([1])
    batch.finalize()
    keys, _ = batch.update_and_fetch(coded([2]), coded([2]))
    assert keys.shape[0] == 1
    assert held(keys) == [0, 1, 2]


def test_sinks_survive_a_batch() -> None:
    model = windowed(keep=2)
    caches = [make_prompt_cache(model) for _ in range(2)]
    for cache in caches:
        for position in range(24):
            fed(cache, [position])
    batch = caches[0][0].merge([cache[0] for cache in caches])
    alone = batch.extract(1)
    for position in range(24, 30):
        keys, _ = alone.update_and_fetch(coded([position]), coded([position]))
    assert held(keys) == [0, 1, *range(24, 30)]
    assert (alone.keep, alone.max_size) == (2, 8)


@pytest.mark.parametrize("keep", [2, 3])
def test_sinks_are_seen_alike_in_blocks_and_one_by_one(keep: int) -> None:
    model = windowed("wf", keep=keep)
    expected = logits_of(model, make_theirs(model), TEXT[:14], 1)
    for blocks in ((14,), (6, 8), (10, 4), (10, 1, 3)):
        cache, found, start = make_prompt_cache(model), [], 0
        for size in blocks:
            found.append(logits_of(model, cache, TEXT[start : start + size]))
            start += size
        assert difference(mx.concatenate(found), expected) <= 1e-5


def test_a_narrower_mask_shows_the_newest_token() -> None:
    cache = make_prompt_cache(windowed(keep=2))
    for position in range(20):
        fed(cache, [position])
    mask = cache[0].make_mask(1, window_size=4)
    keys, _ = cache[0].update_and_fetch(coded([20]), coded([20]))
    shown = [position for position, seen in zip(held(keys), mask.reshape(-1).tolist(), strict=True) if seen]
    assert shown == [0, 1, 17, 18, 19, 20]


def graph_size(arrays: list[mx.array]) -> int:
    """Nodes that evaluating these arrays would compute."""
    text = io.StringIO()
    if arrays:
        mx.export_to_dot(text, *arrays)
    return text.getvalue().count("->")


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "deepseek_v32", "llama"])
def test_graphs_do_not_grow(name: str) -> None:
    """500 steps of which only the logits are evaluated: what they leave out stays bounded."""
    model = build(name)
    cache = make_prompt_cache(model)
    sizes = []
    for step in range(500):
        logits = model(mx.array([[step % 90]]), cache=cache)
        mx.eval(logits)
        sizes.append(mx.get_active_memory())
    assert graph_size(cache.pool.buffers) <= 256 * len(cache.pool.buffers)
    assert (sizes[-1] - sizes[99]) / 400 <= cache.nbytes / 500 + 4096


def test_values_that_nobody_reads_leave_no_graph() -> None:
    cache = make_prompt_cache(windowed("f"))
    for position in range(256):
        keys, _ = cache[0].update_and_fetch(coded([position]), coded([position]))
        mx.eval(keys)
    assert graph_size(cache.pool.buffers) <= 64 * 8


def test_a_batch_of_which_only_keys_and_values_are_evaluated_leaves_no_graph() -> None:
    batch = merged(windowed("f"), 3, 5)
    for position in range(256):
        mx.eval(batch.update_and_fetch(coded([position], [position]), coded([position], [position])))
    assert graph_size([batch.offset]) <= 8


def test_a_state_that_is_none_stays_none() -> None:
    model = build("mamba2")
    caches = [make_prompt_cache(model) for _ in range(2)]
    batch = [layer.merge([cache[index] for cache in caches]) for index, layer in enumerate(caches[0])]
    alone = batch[0].extract(0)
    assert [alone[0], alone[1]] == [None, None]


def test_arrays_that_were_handed_out_never_change() -> None:
    batch = merged(windowed("f"), 3, 5)
    offset = batch.offset
    batch.prepare(lengths=[2, 1], right_padding=[0, 1])
    batch.update_and_fetch(coded([3, 4], [5, 90]), coded([3, 4], [5, 90]))
    batch.finalize()
    assert offset.tolist() == [3, 5]
    assert batch.offset.tolist() == [5, 6]


def test_lengths_that_were_handed_out_never_change() -> None:
    model = build("mamba2")
    caches = [make_prompt_cache(model) for _ in range(2)]
    layer = caches[0][0].merge([cache[0] for cache in caches])
    layer.prepare(lengths=[4, 2], right_padding=[0, 2])
    lengths = layer.lengths
    layer.advance(2)
    assert lengths.tolist() == [4, 2]


def test_a_write_through_a_copy_is_not_seen_in_the_original() -> None:
    cache = make_prompt_cache(windowed("f"))
    fed(cache, [0, 1, 2])
    twin = copy.deepcopy(cache)
    assert fed(twin, [70, 71]) == [0, 1, 2, 70, 71]
    assert fed(cache, [3]) == [0, 1, 2, 3]
    assert fed(twin, [72]) == [0, 1, 2, 70, 71, 72]


def test_a_copy_and_a_token_cost_one_cache_and_a_little() -> None:
    model = windowed("ff")
    cache = make_prompt_cache(model)
    fed(cache, list(range(4000)))
    before = cache.pool.nbytes
    twin = copy.deepcopy(cache)
    fed(twin, [4000])
    assert cache.pool.nbytes <= 1.05 * before


def test_a_bound_is_honoured_on_models_with_caches_of_their_own() -> None:
    model = windowed("fw")
    with attach(model):
        cache = mlx_lm_cache.make_prompt_cache(model, max_kv_size=24)
    for token in TEXT[:100]:
        logits_of(model, cache, [token])
        assert cache.position <= 24


def test_going_back_further_than_is_kept_shows_nobody_elses_text() -> None:
    model = windowed("w")
    cache = make_prompt_cache(model, rewind=2)
    logits_of(model, cache, TEXT[:30], 5)
    with pytest.raises(NotSupportedError):
        cache.rewind(20)
    expected = logits_of(model, make_theirs(model), TEXT[:31], 1)[-1:]
    assert difference(logits_of(model, cache, TEXT[30:31]), expected) <= 1e-5


def test_a_prompt_longer_than_the_capacity_is_refused_and_room_can_be_made() -> None:
    model = windowed("fw")
    cache = make_prompt_cache(model, capacity=32)
    with pytest.raises(CacheFullError):
        logits_of(model, cache, TEXT[:33])
    assert cache.position == 0
    logits_of(model, cache, TEXT[:32], 8)
    with pytest.raises(CacheFullError):
        logits_of(model, cache, TEXT[32:33])
    cache.remove(4, 16)
    logits_of(model, cache, TEXT[32:40])
    assert cache.position == 28
