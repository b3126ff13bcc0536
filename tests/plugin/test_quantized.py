"""Keys and values in fewer bits on every architecture.

What comes out must equal what mlx-lm's own float caches give where each key and value is rounded
to the same bits before it is stored.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList, load_prompt_cache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache.plugin import attach, make_prompt_cache, make_session_pool
from mlx_kvcache.quantization import Codec
from tests.plugin.configurations import CONFIGURATIONS, DIFFERS_IN_BLOCKS, STAY_NARROW, build, chosen
from tests.plugin.running import difference, greedy, logits_of
from tests.plugin.tiny import tiny_llama
from tests.rounding import rounded

TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]
GROUP = 32
NAMES = [name for name in CONFIGURATIONS if name not in {"deepseek_v41", *STAY_NARROW}]
SOME = ["llama", "llama:window", "gemma3_text", "gpt_oss", "deepseek_v32", "kimi_linear", "llama4"]
SOME += ["qwen3_next"]
"""Full, windows, learned sinks, a latent with an index beside it, chunks, and recurrences between."""


@lru_cache(maxsize=2)
def model_of(name: str) -> nn.Module:
    return build(name, is_wide=True)


def theirs_rounded(model: nn.Module, bits: tuple[int, int] = (8, 8), group: int = GROUP) -> list[Any]:
    """mlx-lm's own caches, which are given rounded keys and values."""

    def round_in(entry: Any) -> None:
        if isinstance(entry, CacheList):
            for child in entry.caches:
                round_in(child)
        elif not isinstance(entry, ArraysCache):
            entry.update_and_fetch = partial(update, entry.update_and_fetch)

    def update(original: Any, keys: mx.array, values: mx.array) -> Any:
        is_latent = keys.shape[1] == 1 and keys.shape[3] != values.shape[3]
        lanes = []
        for array, width in zip((keys, values), bits, strict=True):
            codec = Codec(width, group, "none" if width == 8 or is_latent else "hadamard")
            lanes.append(rounded(array, codec) if array.shape[-1] else array)
        return original(*lanes)

    cache: list[Any] = make_theirs(model)
    for entry in cache:
        round_in(entry)
    return cache


def assert_equal(ours: mx.array, expected: mx.array, exact: int = 1) -> None:
    """As many tokens are equal, and most are close.

    The last bit of a float, which differs with the threads of the BLAS, can tip a feature into the
    next level, and all tokens that see it from there on.
    """
    worst = mx.sort(mx.abs(ours - expected).max(axis=-1) / mx.std(expected))
    assert not exact or worst[exact - 1] <= 1e-4
    assert worst[worst.size // 2] <= 0.05


@pytest.mark.parametrize("name", chosen(NAMES))
def test_equals_rounded_keys_and_values(name: str) -> None:
    """A block, single tokens, back, and a fork that goes on."""
    model = model_of(name)
    cache = make_prompt_cache(model, kv_bits=(8, 6), kv_group_size=GROUP, kv_recent=0)
    block = 1 if name in DIFFERS_IN_BLOCKS else 12
    theirs = theirs_rounded(model, (8, 6))
    expected = mx.concatenate(
        [logits_of(model, theirs, TEXT[:12], block), logits_of(model, theirs, TEXT[12:32], 1)]
    )
    ours = mx.concatenate([logits_of(model, cache, TEXT[:12]), logits_of(model, cache, TEXT[12:32], 1)])
    assert_equal(ours[:12], expected[:12], exact=6)
    assert_equal(ours[12:], expected[12:], exact=1)
    point = cache.resume_point(28)
    fork = cache.fork()
    fork.rewind_to(point)
    assert_equal(logits_of(model, fork, TEXT[point:32], 1), ours[point:], exact=0)


@pytest.mark.parametrize("name", sorted(STAY_NARROW))
def test_heads_that_do_not_fit_are_refused_with_the_numbers(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"head_dim 16 of .* is not a multiple of group_size 64; no supported"
    ):
        make_prompt_cache(build(name), kv_bits=8)


@pytest.mark.parametrize("name", SOME)
def test_batches(name: str) -> None:
    """Sequences of unequal length that generate together choose the tokens that each chooses alone."""
    model = model_of(name)
    prompts = [TEXT[:17], TEXT[20:26], TEXT[31:42]]
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": GROUP}
    with attach(model, **options):
        generator = BatchGenerator(model, max_tokens=8)
        tickets = generator.insert(prompts)
        found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
    for ticket, prompt in zip(tickets, prompts, strict=True):
        alone = [
            token
            for token, _ in generate_step(
                mx.array(prompt), model, max_tokens=8, prompt_cache=make_prompt_cache(model, **options)
            )
        ]
        assert found[ticket] == alone


@pytest.mark.parametrize("name", SOME)
def test_the_bits_of_mlx_lms_commands(name: str) -> None:
    """Where generation is told to quantize, from a length on, mlx-lm can on full attention only."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    before = None
    told = {"kv_bits": 8, "kv_group_size": GROUP, "quantized_kv_start": 20}
    for _ in generate_step(mx.array(TEXT[:16]), model, max_tokens=3, prompt_cache=cache, **told):
        assert cache.pool.quantization is None
        before = cache.nbytes
    position = cache.position
    more = generate_step(mx.array(TEXT[16:20]), model, max_tokens=3, prompt_cache=cache, **told)
    assert len(list(more)) == 3
    assert cache.pool.quantization is not None
    assert cache.position > position + 4
    assert before is not None and (cache.nbytes < before or cache.pool.layout.is_recurrent)
    reference = make_prompt_cache(model, kv_bits=8, kv_group_size=GROUP)
    assert cache.pool is reference.pool


def test_each_layer_is_told_how() -> None:
    model = tiny_llama(head_dim=64)
    ways: list[tuple[dict[str, Any], list[str]]] = [
        ({"kv_bits": 8}, ["QuantizedKVCache"] * 3),
        ({"kv_bits": 8, "kv_float": "last"}, ["QuantizedKVCache", "QuantizedKVCache", "KVCache"]),
        ({"kv_bits": 8, "kv_float": [0, -1]}, ["KVCache", "QuantizedKVCache", "KVCache"]),
        ({"kv_bits": lambda layer: (8, 4) if layer else None, "kv_recent": 0}, ["KVCache"] * 3),
        ({"kv_bits": 8, "quantize_after": 10}, ["KVCache"] * 3),
    ]
    sizes = []
    for options, names in ways:
        cache = make_prompt_cache(model, **options)
        logits_of(model, cache, TEXT[:40])
        assert [type(layer).__name__ for layer in cache] == names
        sizes.append([layer.nbytes for layer in cache])
        mx.eval([layer.state for layer in cache])
    whole, packed = 40 * 2 * 2 * 64 * 4, 40 * 2 * 2 * (64 + 4)
    assert sizes[:3] == [[packed] * 3, [packed, packed, whole], [whole, packed, whole]]
    assert sizes[3][0] == whole and sizes[3][1] < packed
    assert sizes[4] == [packed] * 3


def test_an_iterator_of_layers_serves_every_cache() -> None:
    model = build("llama", is_wide=True)
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}
    with attach(model, kv_float=iter([0]), **options):
        kinds = [[type(layer).__name__ for layer in mlx_lm_cache.make_prompt_cache(model)] for _ in range(2)]
    pool = make_session_pool(model, kv_float=iter([0]), **options)
    kinds += [[type(layer).__name__ for layer in pool.open([1]).cache] for _ in range(2)]
    assert kinds == [["KVCache", "QuantizedKVCache"]] * 4


def test_a_cache_begins_in_float() -> None:
    model = tiny_llama(head_dim=64)
    cache, plain = (
        make_prompt_cache(model, kv_bits=4, quantize_after=20, kv_recent=0),
        make_prompt_cache(model),
    )
    logits_of(model, cache, TEXT[:20]), logits_of(model, plain, TEXT[:20])
    assert cache.nbytes == plain.nbytes
    assert difference(logits_of(model, cache.fork(), [1]), logits_of(model, plain.fork(), [1])) > 0
    fork = cache.fork()
    fork.rewind(1)
    plain.rewind(1)
    assert difference(logits_of(model, fork, TEXT[19:20]), logits_of(model, plain, TEXT[19:20])) <= 1e-5


def test_learned_bits_and_pairs_that_are_one_join_one_batch() -> None:
    model = tiny_llama(head_dim=64)
    pools = {
        id(make_prompt_cache(model, kv_bits=bits).pool): cache
        for cache in [make_prompt_cache(model, kv_bits=8)]
        for bits in (8, (8, 8), lambda layer: 8)
    }
    assert len(pools) == 1


@pytest.mark.parametrize("bits", [8, (8, 4), 3])
def test_removals_do_not_drift(bits: Any) -> None:
    """Keys before the gap are rotated from what was first stored, however often."""
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=bits)
    often, once = cache, cache.fork()
    logits_of(model, often, TEXT[:60])
    logits_of(model, once, TEXT[:60])
    for _ in range(20):
        often.remove(8, 10)
    once.remove(8, 48)
    assert difference(logits_of(model, often, TEXT[:4]), logits_of(model, once, TEXT[:4])) <= 1e-4


def test_text_goes_on_when_the_capacity_overflows() -> None:
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, capacity=32, overflow="shift", sinks=4, kv_bits=8)
    for start in range(0, 200, 8):
        assert mx.isfinite(logits_of(model, cache, (TEXT * 4)[start : start + 8])).all().item()
        assert cache.position <= 32


@pytest.mark.parametrize(("bits", "error"), [(8, 1e-2), (6, 0.1)])
def test_what_mlx_lm_saves_it_loads(bits: int, error: float, tmp_path: Path) -> None:
    """One number of bits on full attention is mlx-lm's own form, which has no transform."""
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=bits)
    logits_of(model, cache, TEXT[:30])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    theirs = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert {type(layer).__name__ for layer in theirs} == {"QuantizedKVCache"}
    expected = logits_of(model, theirs, TEXT[30:34], 1)
    assert difference(logits_of(model, cache, TEXT[30:34], 1), expected) <= error * mx.std(expected)


def test_generation_equals_mlx_lm_where_bits_are_enough() -> None:
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=8)
    prompt = mx.array(TEXT[:20])
    ours = [token for token, _ in generate_step(prompt, model, max_tokens=12, prompt_cache=cache)]
    assert ours[:6] == greedy(model, TEXT[:20], 12)[:6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 7}, "7 bits"),
        ({"kv_bits": lambda layer: 9}, "9 bits"),
        ({"kv_bits": "8"}, "'8' bits"),
        ({"kv_bits": 8.0}, "8.0 bits"),
        ({"kv_bits": (8,)}, r"pair of widths for keys and values; got \(8,\)"),
        ({"kv_bits": 8, "kv_float": "first"}, "got 'first'"),
        ({"kv_bits": 8, "kv_group_size": 48}, "48"),
        ({"kv_bits": 8, "kv_float": [3]}, "kv_float contains 3; layer indices are -3 to 2"),
        ({"kv_text": None}, r"kv_text must be token ids, .* got None"),
        ({"kv_bits": 4, "kv_text": "words"}, r"kv_text contains 'w'; it must be token ids"),
        (
            {"kv_bits": 4, "kv_text": [3, 10**9]},
            r"kv_text contains the token 1000000000, but the model has \d+ ",
        ),
        ({"kv_bits": 8, "kv_transform": "fourier"}, "transform 'fourier' .*; supported: .'hadamard', 'none'"),
        ({"kv_bits": 8, "quantize_after": -1}, "after must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_prompt_cache(tiny_llama(head_dim=64), **options)
