"""What entries of a model's cache list answer, beside mlx-lm's own that have read the same."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError, CacheFullError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(20)]
NAMES = ["llama", "gemma3_text", "llama4", "mamba2", "falcon_h1", "deepseek_v32"]
"""Full, windows, chunks, recurrences, and several layers in one entry with and without a recurrence."""


@pytest.mark.parametrize("name", NAMES)
def test_the_same_questions(name: str) -> None:
    """Before the first token, after some, and, where that can be, after fewer."""
    model = build(name)
    ours, theirs = make_prompt_cache(model, rewind=3), make_theirs(model)

    def compare() -> None:
        for own, other in zip(ours, theirs, strict=True):
            # Recurrent layers go back here, and not with mlx-lm's caches.
            assert own.is_trimmable() == (other.is_trimmable() or ours.pool.layout.is_recurrent)
            assert own.empty() == other.empty()
            if hasattr(other, "caches"):
                assert [child.empty() for child in own.caches] == [child.empty() for child in other.caches]
            if hasattr(other, "offset"):
                assert own.offset == other.offset
            assert (own.nbytes > 0) == (other.nbytes > 0)

    compare()
    for tokens in (TEXT[:5], TEXT[5:6]):
        found, expected = logits_of(model, ours, tokens), logits_of(model, theirs, tokens)
        assert difference(found, expected) <= 1e-4
        compare()
    if all(entry.is_trimmable() for entry in theirs):
        assert [entry.trim(2) for entry in ours] == [entry.trim(2) for entry in theirs]
        compare()
        assert difference(logits_of(model, ours, TEXT[6:9]), logits_of(model, theirs, TEXT[6:9])) <= 1e-4
        compare()


@pytest.mark.parametrize("name", ["falcon_h1", "deepseek_v32"])
def test_several_layers_in_one_entry(name: str) -> None:
    """They hold as many tokens as the fullest of them, join with others, and are packed where they can be."""
    model = build(name, is_wide=True)
    one, two = make_prompt_cache(model), make_prompt_cache(model)
    logits_of(model, one, TEXT[:6])
    logits_of(model, two, TEXT[:9])
    assert [entry.size() for entry in one] == [6] * len(one)
    both = [a.merge([a, b]) for a, b in zip(one, two, strict=True)]
    third = make_prompt_cache(model)
    logits_of(model, third, TEXT[:4])
    for entry, more in zip(both, [entry.merge([entry]) for entry in third], strict=True):
        entry.extend(more)
    assert [entry.extract(1)[0].rows.positions for entry in both] == [[9]] * len(both)
    packed = make_prompt_cache(model)
    layers = [entry.to_quantized(32, 8) for entry in packed]
    logits_of(model, layers, TEXT[:6])
    assert 0 < sum(entry.nbytes for entry in layers) < sum(entry.nbytes for entry in one)


def test_rows_that_are_named_again_are_forked() -> None:
    model = tiny_llama()
    caches = [make_prompt_cache(model) for _ in range(2)]
    for cache, n in zip(caches, (6, 9), strict=True):
        logits_of(model, cache, TEXT[:n])
    batch = [one.merge([one, two]) for one, two in zip(*caches, strict=True)]
    for wrong in (2, -3):
        with pytest.raises(ValueError, match=f"row {wrong} is out of range: the batch has 2 rows"):
            batch[0].filter([0, wrong])
        with pytest.raises(ValueError, match=f"row {wrong} is out of range: the batch has 2 rows"):
            batch[0].extract(wrong)
    for layer in batch:
        layer.filter([1, 1, -2])
    assert batch[0].rows.positions == [9, 9, 6]
    found = model(mx.array([[3], [4], [3]]), cache=batch)[:, -1]
    for row, (n, token) in enumerate(((9, 3), (9, 4), (6, 3))):
        expected = logits_of(model, make_theirs(model), [*TEXT[:n], token])[-1]
        assert difference(found[row], expected) <= 1e-4


def test_padding_may_come_in_arrays() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    batch = [layer.merge([layer, layer]) for layer in cache]
    with pytest.raises(TypeError):
        batch[0].prepare(left_padding=[0, 1.5])
    for layer in batch:
        layer.prepare(left_padding=mx.array([0, 2]))
    found = model(mx.array([TEXT[:5], [0, 0, *TEXT[:3]]]), cache=batch)[:, -1]
    for row, n in enumerate((5, 3)):
        assert difference(found[row], logits_of(model, make_theirs(model), TEXT[:n])[-1]) <= 1e-4


def test_a_full_row_is_told_before_another_shifts() -> None:
    model = tiny_llama()
    caches = [make_prompt_cache(model, capacity=20, overflow=way) for way in ("shift", "error")]
    for cache in caches:
        logits_of(model, cache, TEXT)
    batch = [one.merge([one, two]) for one, two in zip(*caches, strict=True)]
    with pytest.raises(CacheFullError, match="1 cells needed, 0 free of a capacity of 20: remove or rewind"):
        model(mx.array([[1], [2]]), cache=batch)
    assert batch[0].rows.positions == [20, 20]


def test_a_state_changes_in_a_call_only() -> None:
    model = build("mamba2")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:4])
    assert cache[0][0].shape[0] == cache[0].batch_size == 1
    with pytest.raises(CacheError, match="layer 0 can change only while the model is called"):
        cache[0][0] = mx.zeros(3)


def test_input_of_another_number_of_rows() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    for tokens, message in (
        ([[1], [2]], "2 rows, but the prompt cache has 1"),
        ([[]], r"got shape \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(mx.array(tokens, mx.int32), cache=cache)
    assert cache.position == 0


@pytest.mark.parametrize("name", ["llama", "llama:window", "gemma3_text", "deepseek_v3"])
def test_keys_are_those_of_the_tokens(name: str) -> None:
    """Whichever cells they are in: tools take the first `offset` of them, as of mlx-lm's own caches."""
    model = build(name)
    one, two = make_prompt_cache(model), make_prompt_cache(model)
    for cache, begin in ((one, 0), (two, 3), (one, 5), (two, 7)):
        logits_of(model, cache, TEXT[begin : begin + 5])
    for cache in (one, two, two.fork(), PromptCache(one[0].merge([two[0], one[0]]).extract(1).rows)):
        for layer in cache:
            keys, values = layer.plain_state[:2]
            assert mx.array_equal(layer.keys, keys) and mx.array_equal(layer.values, values)
            with pytest.raises(CacheError, match=r"cannot assign keys of layer .* may share its cells"):
                layer.keys = keys + 1
    again = make_prompt_cache(model)
    logits_of(model, again, [*TEXT[3:8], *TEXT[7:12]], 5)
    assert difference(logits_of(model, two, [5]), logits_of(model, again, [5])) <= 1e-5


def test_quantized_keys_are_as_mlx_lm_holds_them() -> None:
    model = tiny_llama(head_dim=32)
    cache = make_prompt_cache(model, kv_bits=8, kv_group_size=32)
    logits_of(model, cache, TEXT[:6])
    assert [array.shape for array in cache[0].keys] == [(1, 2, 6, 8), (1, 2, 6, 1), (1, 2, 6, 1)]
