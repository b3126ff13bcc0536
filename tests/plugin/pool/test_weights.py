"""Files and stored caches are of the weights that they were computed with, and of no others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_kvcache import CacheError, CacheFileError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache, make_session_pool
from mlx_kvcache.plugin.pool import weights as fingerprint
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.serving.test_disk import TEXT, say
from tests.plugin.test_files import Words
from tests.plugin.tiny import tiny_llama

LORA = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}


def with_lora(model: nn.Module) -> list[nn.Module]:
    """Put LoRA layers whose deltas are not zero into all layers of a model."""
    linear_to_lora_layers(model, len(model.layers), LORA)
    found = [module for _, module in model.named_modules() if hasattr(module, "lora_b")]
    for i, module in enumerate(found):
        module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(i)) * 0.05
    return found


def fused(model: nn.Module) -> None:
    """What `mlx_lm.fuse` does: LoRA's deltas become part of the weights."""
    with_lora(model)
    layers = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))


def saved(path: Path, model: nn.Module) -> PromptCache:
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:5])
    cache.save(path)
    return cache


def low_rank(array: mx.array, seed: int) -> mx.array:
    """A change of rank 1, of one percent; what is no matrix of floats is drawn anew."""
    keys = mx.random.split(mx.random.key(seed))
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape, key=keys[0]).astype(mx.uint32)
    if array.ndim < 2:
        return array + mx.random.normal(array.shape, key=keys[0]) * 0.01
    column = mx.random.normal((*array.shape[:-1], 1), key=keys[0])
    row = mx.random.normal((1,) * (array.ndim - 1) + array.shape[-1:], key=keys[1])
    return array + column * row * 0.01


@pytest.mark.parametrize(("layers", "bits"), [(26, None), (16, 4)], ids=["float", "4 bits"])
def test_a_change_of_any_array_is_seen(layers: int, bits: int | None) -> None:
    model = tiny_llama(num_hidden_layers=layers, hidden_size=64, intermediate_size=64)
    if bits:
        nn.quantize(model, 32, bits)
    parameters = tree_flatten(model.parameters())
    seen = {fingerprint.fingerprint(model)["weights"]}
    for i, (name, array) in enumerate(parameters):
        model.update(tree_unflatten([(name, low_rank(array, i))]))
        seen.add(fingerprint.fingerprint(model)["weights"])
        model.update(tree_unflatten([(name, array)]))
    assert len(seen) == 1 + len(parameters)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5000,), (3, 2000), (300, 4, 5), (2, 3, 4, 5, 6), (0, 4)])
def test_arrays_of_any_shape_are_sampled_all_over(shape: tuple[int, ...]) -> None:
    array = mx.random.normal(shape, key=mx.random.key(0))
    for dtype in (mx.float32, mx.bfloat16):
        sample = fingerprint.sample(array.astype(dtype))
        assert 0 <= sample.size <= 2 * fingerprint.NUMBERS
        assert sample.size >= min(array.size, fingerprint.NUMBERS // 4)


def test_arrays_that_do_not_lie_in_order_are_not_copied_whole() -> None:
    array = mx.zeros((4000, 2000)).T
    mx.eval(array)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(fingerprint.sample(array))
    assert mx.get_peak_memory() - before < 1 << 20


def changed(model: nn.Module) -> list[tuple[str, mx.array]]:
    """All arrays, each a little larger."""
    return [(name, array * 1.01) for name, array in tree_flatten(model.parameters())]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "LoRA": with_lora,
    "LoRA, fused": fused,
    "update": lambda model: model.update(tree_unflatten(changed(model)[:1])),
    "load_weights": lambda model: model.load_weights(changed(model)),
    "quantize": lambda model: nn.quantize(model, 32, 8, class_predicate=lambda name, _: "v_proj" in name),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_told_apart(name: str, tmp_path: Path) -> None:
    """On load, on save, and in a session pool, in memory and on disk."""
    model, path = tiny_llama(num_hidden_layers=6, intermediate_size=64), tmp_path / "a"
    cache = saved(path, model)
    with make_session_pool(model, folder=tmp_path / "folder") as sessions:
        assert say(sessions, TEXT[:40], model) == 0
        assert say(sessions, TEXT[:50], model) == 40
        held = sessions.open(TEXT[:60])
        assert held.reused == 50
        with held:
            CHANGES[name](model)
            mx.eval(model.parameters())
            logits_of(model, held.cache, held.rest)
        assert sessions.counts.rejected == {"computed with other weights": 1}
        with pytest.raises(CacheFileError, match="of another model: its weights"):
            PromptCache.load(path, model)
        before = path.read_bytes()
        with pytest.raises(CacheError, match="weights have changed since this cache was made"):
            cache.save(path)
        assert path.read_bytes() == before
        assert say(sessions, TEXT[:60], model) == 0
        assert say(sessions, TEXT[:70], model) == 60
    with make_session_pool(model, folder=tmp_path / "folder") as sessions:
        assert say(sessions, TEXT[:80], model) == 70


def test_caches_that_are_made_after_a_change_do_not_join_older_ones() -> None:
    model = tiny_llama()
    before = make_prompt_cache(model)
    assert make_prompt_cache(model).pool is before.pool
    model.update(tiny_llama(mx.bfloat16).parameters())
    after = make_prompt_cache(model)
    assert after.pool is not before.pool
    logits_of(model, after, TEXT[:5])
    assert after[0].state[0].dtype == mx.bfloat16


def test_weights_that_a_model_replaces_itself(tmp_path: Path) -> None:
    """gemma3n clips some of its weights in every call."""
    model = build("gemma3n")
    known = fingerprint.fingerprint(model)
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:5])
    assert make_prompt_cache(model).pool is cache.pool
    cache.save(tmp_path / "a")
    assert PromptCache.load(tmp_path / "a", model).position == 5
    before = fingerprint.fingerprint(model)
    assert before["weights"] != known["weights"]
    logits_of(model, cache, TEXT[5:9])
    model.update(tree_unflatten(changed(model)[-1:]))
    assert fingerprint.fingerprint(model)["weights"] != before["weights"]


class Counted(Words):
    """Counts how often it is asked for all of its words."""

    asked = 0

    def get_vocab(self) -> dict[str, int]:
        self.asked += 1
        return super().get_vocab()


def test_weights_and_words_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, sampled = tiny_llama(head_dim=64), Counted("a", "b"), list[int]()
    sample = fingerprint.sample

    def counted(array: mx.array) -> mx.array:
        sampled.append(1)
        return sample(array)

    monkeypatch.setattr(fingerprint, "sample", counted)
    for _ in range(2):
        with make_session_pool(model, folder=tmp_path, max_stored=1, tokenizer=tokenizer) as sessions:
            for i in range(10):
                say(sessions, [i % 3, *TEXT[:30]], model)
                sessions.flush()
    assert tokenizer.asked == 1
    assert len(sampled) == len(tree_flatten(model.parameters()))
    cache = make_prompt_cache(model)
    for _ in range(3):
        cache.save(tmp_path / "a", tokenizer=tokenizer)
        PromptCache.load(tmp_path / "a", model, tokenizer)
    assert tokenizer.asked == 1
    tokenizer.chat_template = "another"
    with pytest.raises(CacheFileError, match="its tokenizer"):
        PromptCache.load(tmp_path / "a", model, tokenizer)
    assert tokenizer.asked == 2


def test_nothing_is_remembered_of_models_that_are_gone() -> None:
    known = len(fingerprint._versions._entries), len(fingerprint._tokenizers)
    for _ in range(3):
        fingerprint.fingerprint(tiny_llama(num_hidden_layers=1), Words("a"))
    assert (len(fingerprint._versions._entries), len(fingerprint._tokenizers)) == known


def test_threads_agree_on_the_version_of_the_weights() -> None:
    model, found = tiny_llama(), list[Any]()
    threads = [threading.Thread(target=lambda: found.append(fingerprint.version_of(model))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_a_file_that_was_saved_before_all_arrays_were_sampled(tmp_path: Path) -> None:
    """It is compared as it was then."""
    from tests.persist.test_files import lie

    model, path = tiny_llama(num_hidden_layers=16, intermediate_size=64), tmp_path / "a"
    saved(path, model)
    lie(path, lambda header, arrays: header["model"].update(weights=fingerprint.first_form(model)))
    assert PromptCache.load(path, model).position == 5
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1.01
    with pytest.raises(CacheFileError, match="of another model: its weights"):
        PromptCache.load(path, model)
