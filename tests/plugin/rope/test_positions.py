"""Removal from the middle, for every way in which models tell positions apart.

A model of one layer caches each token's K and V without regard to the others, so after a
removal it must answer as if the removed tokens had never been there.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import ministral3

from mlx_kvcache import CacheFullError, NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.pool import conversation as conversation_module
from mlx_kvcache.plugin.rope.probe import scheme_of
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import randomized, tiny_deepseek_v3, tiny_gpt2, tiny_llama

TEXT = [(7 * i + i * i) % 97 for i in range(90)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SU = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "su": SU,
    "proportional": PROPORTIONAL,
}


def one_layer(name: str) -> nn.Module:
    if name == "traditional":
        return tiny_llama(num_hidden_layers=1, rope_traditional=True)
    if name == "deepseek_v3":
        return tiny_deepseek_v3(num_hidden_layers=1)
    if name == "ministral3":
        return tiny_ministral3()
    return tiny_llama(num_hidden_layers=1, rope_scaling=SCALINGS[name])


def tiny_ministral3() -> nn.Module:
    """Scales queries by their absolute position, so that its offset may not run ahead."""
    arguments = {
        "model_type": "ministral3",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 97,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 16,
        },
    }
    return randomized(ministral3.Model(ministral3.ModelArgs.from_dict(arguments)))


NAMES = [*SCALINGS, "traditional", "deepseek_v3", "ministral3"]


@pytest.mark.parametrize("name", NAMES)
def test_removed_tokens_might_never_have_been_there(name: str) -> None:
    model = one_layer(name)
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:40])
    left = list(TEXT[:40])
    for begin, end in [(4, 11), (20, 21), (0, 3), (2, 20)]:
        cache.remove(begin, end)
        del left[begin:end]
        assert cache.position == len(left)
        ours = logits_of(model, cache, TEXT[50:53], 1)
        left += TEXT[50:53]
        fresh = logits_of(model, make_prompt_cache(model), left)
        assert difference(ours, fresh[-3:]) <= 2e-5


def test_only_ministral3_may_not_run_ahead() -> None:
    assert [scheme_of(one_layer(name)).ahead for name in NAMES] == [name != "ministral3" for name in NAMES]


def test_a_latent_carries_its_rotation_in_the_values() -> None:
    rotations = scheme_of(tiny_deepseek_v3()).rotations
    assert [(r.slots, r.start, r.shift.dims) for r in rotations if r] == [((1,), 0, 8)] * 2


def dynamic() -> nn.Module:
    try:
        return tiny_llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32)
    except ValueError as error:
        # mlx-lm 0.31 does not have it.
        pytest.skip(str(error))


@pytest.mark.parametrize("made", [tiny_gpt2, dynamic], ids=["learned", "dynamic"])
def test_what_is_not_understood_is_refused(made: Callable[[], nn.Module]) -> None:
    model = made()
    cache = make_prompt_cache(model)
    before = logits_of(model, cache, TEXT[:20])
    with pytest.raises(NotSupportedError, match=r"\[4, 8\) of 20 tokens"):
        cache.remove(4, 8)
    assert cache.position == 20
    cache.rewind(10)
    assert difference(logits_of(model, cache, TEXT[10:20]), before[10:]) <= 1e-5
    with pytest.raises(NotSupportedError, match="shift"):
        make_prompt_cache(model, capacity=16, overflow="shift")


def test_rounding_in_16_bits_hides_no_rotation() -> None:
    """Attention that is this sharp makes later layers' keys differ more than rotations explain."""
    model = tiny_llama(mx.bfloat16, num_hidden_layers=8)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 10
    scheme = scheme_of(model)
    assert scheme.refusal is None and [r.shift.dims for r in scheme.rotations if r] == [8] * 8
    caches = [make_prompt_cache(model) for _ in range(2)]
    for cache, text in zip(caches, (TEXT[:20], TEXT[4:20]), strict=True):
        logits_of(model, cache, text)
    caches[0].remove(0, 4)
    # The first layer's keys depend on tokens and positions only.
    ours, fresh = (cache[0].state[0].astype(mx.float32) for cache in caches)
    assert (mx.abs(ours - fresh) <= 2**-7 * mx.abs(fresh).max()).all().item()


def test_positions_that_are_learned_are_refused_in_16_bits() -> None:
    model = tiny_gpt2()
    model.set_dtype(mx.bfloat16)
    assert "keys of layer 0" in str(scheme_of(model).refusal)


@pytest.mark.parametrize("name", ["plain", "ministral3"])
def test_overflow_shifts_by_itself(name: str) -> None:
    model = one_layer(name)
    cache = make_prompt_cache(model, capacity=24, overflow="shift", sinks=3)
    left: list[int] = []
    for step, token in enumerate(TEXT):
        ours = logits_of(model, cache, [token])
        left.append(token)
        if len(left) > 24:
            del left[3 : 3 + (len(left) - 1 - 3) // 2]
        fresh = logits_of(model, make_prompt_cache(model), left)
        assert difference(ours, fresh[-1:]) <= 2e-5, step
        assert cache.position == len(left) <= 24


@pytest.mark.parametrize(("capacity", "rewind"), [(98, 1), (98, 64), (35, 0)])
def test_chunks_hold_what_a_shift_needs(capacity: int, rewind: int) -> None:
    """Where a chunk begins changes with a shift: the next token may be the last of one."""
    model = build("llama4")
    cache = make_prompt_cache(model, capacity=capacity, overflow="shift", sinks=4, rewind=rewind)
    logits_of(model, cache, [(7 * i) % 90 for i in range(400)], 1)
    assert cache.gaps > 3
    assert cache.position <= capacity


def test_a_shift_that_cannot_be_is_a_full_cache() -> None:
    """So large a block leaves less before it than its window reaches back."""
    model = build("llama:window")
    cache = make_prompt_cache(model, capacity=40, overflow="shift", sinks=4, rewind=4)
    logits_of(model, cache, list(range(40)), 1)
    with pytest.raises(CacheFullError, match="33 cells needed, 0 free of a capacity of 40: cannot shift"):
        model(mx.array([list(range(33))]), cache=cache)
    assert (cache.position, cache.gaps) == (40, 0)
    logits_of(model, cache, list(range(8)))
    assert cache.position <= 40


def test_keys_stay_within_two_roundings_after_500_removals() -> None:
    """bfloat16: each stored key against one float32 rotation of what was first stored."""
    model = tiny_llama(mx.bfloat16, num_hidden_layers=1)
    cache = make_prompt_cache(model)
    scheme_of(model)
    layer, rotation = cache[0], scheme_of(model).rotations[0]
    assert rotation is not None
    originals: list[tuple[mx.array, int]] = []

    def feed(n: int) -> mx.array:
        noise = mx.random.normal((1, 2, n, 8), key=mx.random.key(len(originals))).astype(mx.bfloat16)
        originals.extend((noise[:, :, i : i + 1], layer.offset + i) for i in range(n))
        cache_keys: mx.array
        cache_keys, _ = layer.update_and_fetch(noise, noise)
        return cache_keys

    feed(32)
    for _ in range(500):
        cache.remove(8, 12)
        del originals[8:12]
        keys = feed(4)
        mx.eval(keys, layer.state)
    lead = layer.offset - cache.position
    assert lead == 2000
    worst = 0.0
    for position, (original, stored_at) in enumerate(originals):
        exact = rotation.apply(original.astype(mx.float32), position + lead - stored_at)
        once = exact.astype(mx.bfloat16)
        error = difference(keys[:, :, position : position + 1], exact)
        worst = max(worst, error - 2 * difference(once, exact))
    assert worst <= 0.0


def test_a_far_lead_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "FARTHEST", 20)
    model = one_layer("plain")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:40])
    left = list(TEXT[:40])
    for _ in range(6):
        cache.remove(5, 12)
        del left[5:12]
        ours = logits_of(model, cache, TEXT[60:67])
        left += TEXT[60:67]
        assert cache[0].offset - cache.position <= 20
        fresh = logits_of(model, make_prompt_cache(model), left)
        assert difference(ours, fresh[-7:]) <= 2e-5
