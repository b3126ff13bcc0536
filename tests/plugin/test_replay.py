"""Recurrent layers go back to each of the newest `rewind` tokens, and forget what a removal takes out."""

from __future__ import annotations

import copy
import gc
import os
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import lfm2
from mlx_lm.models.cache import KVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError, NotSupportedError, RecurrentCache
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from mlx_kvcache.plugin.forward.forward import newest
from mlx_kvcache.plugin.hosts.layout import layout_of
from mlx_kvcache.plugin.pool import conversation
from tests.plugin.configurations import CONFIGURATIONS, build, chosen
from tests.plugin.forgetful import Forgetful
from tests.plugin.running import difference, logits_of, model_of

REFUSED = {"deepseek_v41"}
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(150)]
IS_WHOLE = "REPLAY_WHOLE" in os.environ
"""Whether to try each position and each draft, which takes minutes."""
EXACT = 1e-4
"""In units of the logits' standard deviation."""


def is_recurrent(name: str) -> bool:
    return name not in REFUSED and layout_of(model_of(name)).is_recurrent


RECURRENT = [name for name in CONFIGURATIONS if is_recurrent(name)]


@lru_cache(maxsize=2)
def theirs(name: str) -> mx.array:
    """Logits of all tokens of the text by mlx-lm's own caches, token by token after a block."""
    model = model_of(name)
    cache = make_theirs(model)
    return mx.concatenate([logits_of(model, cache, TEXT[:8]), logits_of(model, cache, TEXT[8:], 1)])


def assert_follows(name: str, cache: Any, begin: int, n: int = 8) -> None:
    """The next n tokens of the text have the logits of a fresh computation."""
    expected = theirs(name)[begin : begin + n]
    ours = logits_of(model_of(name), cache, TEXT[begin : begin + n])
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


@pytest.mark.parametrize("name", RECURRENT)
def test_every_architecture_can_be_replayed(name: str) -> None:
    cache = make_prompt_cache(model_of(name))
    recurrent = [leaf.index for leaf in cache.pool.leaves if leaf.rule is None]
    assert list(cache.pool.mixers) == recurrent


SOME = [
    "mamba2",
    "rwkv7",
    "baichuan_m1",
    "bailing_hybrid",
    "falcon_h1",
    "lfm2",
    "qwen3_next",
    "recurrent_gemma",
]
"""One of each kind, for tests that would take minutes on all."""


@pytest.mark.parametrize("name", chosen(RECURRENT, SOME))
def test_each_of_the_newest_64_tokens(name: str) -> None:
    """A block longer than `rewind`, a short block, and single tokens."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    for begin, end in ((0, 90), (90, 101)):
        logits_of(model, cache, TEXT[begin:end])
    logits_of(model, cache, TEXT[101:130], 1)
    assert all(cache.can_resume(130 - back) for back in range(65))
    for back in range(65) if IS_WHOLE else (0, 1, 2, 9, 28, 30, 41, 63, 64):
        fork = cache.fork()
        fork.rewind(back)
        assert_follows(name, fork, 130 - back)


@pytest.mark.parametrize("name", chosen(RECURRENT, SOME))
def test_again_and_again(name: str) -> None:
    """Back by all of eight tokens, ten times, in blocks and token by token, as speculative decoding does."""
    model = model_of(name)
    cache = make_prompt_cache(model, rewind=8)
    logits_of(model, cache, TEXT[:40])
    for turn in range(10):
        begin = cache.position
        logits_of(model, cache, [5] * 4 + [turn] * 4, 8 if turn % 2 else 1)
        cache.rewind(8)
        assert_follows(name, cache, begin, 5)
        cache.rewind(turn % 5)
    assert_follows(name, cache, cache.position)


def noisy(name: str, noise: float) -> nn.Module:
    """The model with noise added to its weights: a draft that is right now and then."""
    model = build(name)
    mx.random.seed(1)
    changed = [
        (key, array + noise * mx.random.normal(array.shape) * mx.std(array))
        for key, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    model.load_weights(changed, strict=False)
    return model


def plain(name: str, n: int, **options: Any) -> list[int]:
    model = model_of(name)
    cache = make_prompt_cache(model, **options)
    return [
        int(token) for token, _ in generate_step(mx.array(TEXT[:21]), model, max_tokens=n, prompt_cache=cache)
    ]


def speculative(name: str, draft: nn.Module, n: int, **options: Any) -> tuple[list[int], list[int]]:
    """The text, and how many of four drafted tokens were accepted each time."""
    model = model_of(name)
    cache = [*make_prompt_cache(model, **options), *make_prompt_cache(draft, **options)]
    tokens, accepted, run = [], [], 0
    for token, _, is_drafted in speculative_generate_step(
        mx.array(TEXT[:21]), model, draft, num_draft_tokens=4, max_tokens=n, prompt_cache=cache
    ):
        tokens.append(int(token))
        run += is_drafted
        if not is_drafted:
            accepted.append(run)
            run = 0
    return tokens, accepted


# mlx-lm divides the list of both models' caches by the number of layers, of which not each has a cache.
DIVIDED = [name for name in RECURRENT if name not in ("longcat_flash_ngram", "nemotron_h")]


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0] if IS_WHOLE else [0.1])
@pytest.mark.parametrize("name", chosen(DIVIDED, SOME))
def test_speculative_decoding(name: str, noise: float) -> None:
    """The text is that of plain decoding, however much of the draft is accepted."""
    tokens, accepted = speculative(name, noisy(name, noise), 24)
    assert tokens == plain(name, 24)
    assert noise < 3 or 0 in accepted


def test_every_number_of_accepted_tokens() -> None:
    expected, seen = plain("qwen3_next", 40), set()
    for noise in (0.05, 0.1, 0.2):
        tokens, accepted = speculative("qwen3_next", noisy("qwen3_next", noise), 40)
        assert tokens == expected
        seen |= set(accepted)
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["mamba2", "prism_hadamard_qwen35"])
def test_speculative_decoding_with_quantized_keys(name: str) -> None:
    options = {"kv_bits": 8, "kv_group_size": 32}
    tokens, accepted = speculative(name, noisy(name, 0.1), 40, **options)
    assert tokens == plain(name, 40, **options)
    assert 0 < sum(accepted) < 40


@pytest.mark.parametrize("name", chosen(RECURRENT, SOME))
def test_rows_of_a_batch(name: str) -> None:
    """Rows of unequal length in one batch, each of which then goes back by itself."""
    model = model_of(name)
    caches = [make_prompt_cache(model) for _ in range(3)]
    for length, cache in zip((30, 71, 90), caches, strict=True):
        logits_of(model, cache, TEXT[:length])
    batch = [entry.merge([cache[i] for cache in caches]) for i, entry in enumerate(caches[0])]
    for step in range(6):
        model(mx.array([[TEXT[30 + step]], [TEXT[71 + step]], [TEXT[90 + step]]]), cache=batch)
    for row, length in enumerate((30, 71, 90)):
        for back in (0, 4, 20):
            single = PromptCache(batch[0].rows.extracted(row))
            single.rewind(back)
            assert_follows(name, single, length + 6 - back, 4)


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv7", "falcon_h1"])
def test_padding(name: str) -> None:
    """A padded batch of mlx-lm's tools: rows go back to where each of them was."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    batch = [entry.merge([entry, entry]) for entry in cache]
    for entry in batch:
        entry.prepare(lengths=[80, 70], right_padding=[0, 10])
    model(mx.array([TEXT[:80], TEXT[:70] + [0] * 10]), cache=batch)
    for entry in batch:
        entry.finalize()
    for row, length in enumerate((80, 70)):
        for back in (0, 3, 64):
            single = PromptCache(batch[0].rows.extracted(row))
            single.rewind(back)
            assert_follows(name, single, length - back, 4)


def test_what_is_noted_does_not_grow() -> None:
    model = model_of("qwen3_next")
    cache = make_prompt_cache(model, checkpoints=3)
    token, sizes = mx.array([[1]]), []
    for step in range(2000 if IS_WHOLE else 600):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(token)  # type: ignore[no-untyped-call]
        if step % 64 == 32:
            sizes.append(sum(own.nbytes for own in cache.pool.caches if isinstance(own, RecurrentCache)))
    assert len(set(sizes[-4:])) == 1


def test_where_modules_read_other_layers_too_the_model_is_called_in_pieces() -> None:
    """Their states inside a block are not known, so marks and the newest tokens divide the model's call."""
    model = model_of("baichuan_m1")
    cache = make_prompt_cache(model, rewind=8)
    cache.mark(37)
    expected = theirs("baichuan_m1")[:90]
    assert difference(logits_of(model, cache, TEXT[:90]), expected) <= EXACT * mx.std(expected)
    recurrent, sequence = cache.pool.recurrent, cache._conversation.sequence
    assert recurrent.prepare_restore(sequence, 60) == 37
    assert [p for p in range(70, 91) if recurrent.can_resume(sequence, p)] == list(range(82, 91))


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv7"])
def test_a_mark_ahead_leaves_a_checkpoint_inside_a_block(name: str) -> None:
    model = model_of(name)
    cache = make_prompt_cache(model, rewind=8)
    assert cache.mark(37)
    logits_of(model, cache, TEXT[:90])
    assert cache.resume_point(60) == 37
    fork = cache.fork()
    fork.rewind_to(37)
    assert_follows(name, fork, 37)
    assert cache.mark(85)
    assert not cache.mark(50)
    logits_of(model, cache, TEXT[90:130])
    assert cache.resume_point(90) == 90
    assert cache.resume_point(89) == 85


def test_checkpoints_are_bounded_in_bytes() -> None:
    model = model_of("qwen3_next")
    one = make_prompt_cache(model, rewind=0)
    logits_of(model, one, TEXT[:20])
    size = sum(own.nbytes for own in one.pool.caches if isinstance(own, RecurrentCache))
    free, bounded = (make_prompt_cache(model, rewind=0, checkpoint_bytes=limit) for limit in (None, 3 * size))
    for cache in (free, bounded):
        for begin in range(0, 120, 10):
            logits_of(model, cache, TEXT[begin : begin + 10])
    held = [sum(cache.can_resume(p) for p in range(1, 120)) for cache in (free, bounded)]
    assert held == [11, 3]


@pytest.mark.parametrize("farthest", [1 << 16, 300])
@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid", "bailing_hybrid"])
def test_text_without_end(name: str, farthest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and single tokens, with a capacity: attention forgets the oldest tokens, states do not.

    Offsets begin again where they are far ahead, unless states contain positions.
    """
    monkeypatch.setattr(conversation, "FARTHEST", farthest)
    model, tokens = model_of(name), int(os.environ.get("SHIFT_TOKENS", "640"))
    room = 256
    cache = make_prompt_cache(model, capacity=room, overflow="shift")
    reference = [Forgetful() if isinstance(own, KVCache) else own for own in make_theirs(model)]
    held, sizes = 0, []
    for begin in range(0, tokens, 32):
        sizes.append(cache.nbytes)
        block = [(7 * i + 3 * i * i) % 90 for i in range(begin, begin + 32)]
        if held + 32 > room:
            for own in reference:
                if isinstance(own, Forgetful):
                    own.forget(held // 2)
            held -= held // 2
        held += 32
        size = 8 if begin % 64 else 32
        ours, expected = logits_of(model, cache, block, size), logits_of(model, reference, block, size)
        assert cache.position == held
        # The angles of the reference, whose offsets go on, have an error of offset * 2**-24.
        assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT + begin * 2**-26
    has_begun_again = cache._conversation.head.lead < 300
    assert has_begun_again == (farthest == 300 and name != "bailing_hybrid")
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2])


@pytest.mark.parametrize("name", chosen(RECURRENT, SOME))
def test_a_removal_that_states_keep(name: str) -> None:
    cache = make_prompt_cache(model_of(name))
    logits_of(model_of(name), cache, TEXT[:40])
    before = states_of(cache)
    cache.remove(5, 12, recurrent="keep")
    assert cache.position == 33
    assert all(mx.array_equal(a, b) for a, b in zip(states_of(cache), before, strict=True))
    logits_of(model_of(name), cache, TEXT[40:50], 1)
    cache.rewind(10)
    assert all(apart(a, b) < EXACT for a, b in zip(states_of(cache), before, strict=True))


@pytest.mark.parametrize("name", chosen(RECURRENT, SOME))
def test_a_removal_that_states_forget(name: str) -> None:
    """The first layer's inputs come from the tokens alone, so its state is that of a fresh computation."""
    model = model_of(name)
    cache, other = make_prompt_cache(model), make_prompt_cache(model)
    logits_of(model, cache, TEXT[:40])
    cache.remove(25, 32, recurrent="replay")
    logits_of(model, other, TEXT[:25] + TEXT[32:40])
    assert cache.position == other.position
    first = next(leaf for leaf in cache.pool.leaves if leaf.rule is None)
    # A second module of the layer reads what the first one computed from the removed tokens.
    if first.index == 0 and len(cache.pool.mixers[0].modules) == 1:
        for a, b in zip(states_of(cache)[: first.slots], states_of(other)[: first.slots], strict=True):
            assert apart(a, b) < EXACT
    cache.rewind(15)
    assert cache.position == 18


def states_of(cache: PromptCache) -> list[mx.array]:
    leaves = [leaf for leaf in cache.pool.leaves if leaf.rule is None]
    arrays = [array for leaf in leaves for array in newest(cache._conversation, leaf)]
    return [array for array in arrays if array is not None]


def apart(a: mx.array, b: mx.array) -> float:
    return difference(a, b) / (1e-6 + difference(b, mx.zeros_like(b)))


def test_removals_that_are_refused_change_nothing() -> None:
    model = model_of("qwen3_next")
    cache = make_prompt_cache(model, rewind=8)
    logits_of(model, cache, TEXT[:40])
    before = states_of(cache)
    with pytest.raises(NotSupportedError, match=r'recurrent="keep".*recurrent="replay"'):
        cache.remove(5, 12)
    with pytest.raises(NotSupportedError, match="replay"):
        cache.remove(5, 12, recurrent="replay")
    with pytest.raises(ValueError, match='"refuse", "keep", "replay", got '):
        cache.remove(5, 12, recurrent="forget")  # type: ignore[arg-type]
    assert cache.position == 40
    assert all(mx.array_equal(a, b) for a, b in zip(states_of(cache), before, strict=True))


class Counting(lfm2.ShortConv):  # type: ignore[misc]
    """A mixer whose states depend on more than its inputs: on how often it was called."""

    calls = 0

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        type(self).calls += 1
        out = super().__call__(x, mask=mask, cache=cache)
        if cache is not None:
            cache[0] = cache[0] + type(self).calls
        return out  # type: ignore[no-any-return]


def test_a_mixer_that_depends_on_more_is_refused_by_name() -> None:
    """Such a model goes back to checkpoints only, as its trial finds out."""
    model = build("lfm2")
    model.layers[2].conv.__class__ = Counting
    cache = make_prompt_cache(model)
    for begin in (0, 20):
        logits_of(model, cache, TEXT[begin : begin + 20])
    assert cache.pool.mixers == {}
    assert "states of layer 2 depend on more" in cache.pool.ask(cache.pool, "refusal")
    assert not cache[0].is_trimmable()
    assert [p for p in range(1, 41) if cache.can_resume(p)] == [20, 40]


def test_a_module_that_is_replaced_after_the_trial() -> None:
    """What it computes is not noted, so checkpoints remain. What was noted before is still of use."""
    model, other = build("lfm2"), build("lfm2")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:20])
    fork = cache.fork()
    other.layers[0].conv.update(model.layers[0].conv.parameters())
    model.layers[0].conv = other.layers[0].conv
    logits_of(model, cache, TEXT[20:40])
    assert [p for p in range(21, 41) if cache.can_resume(p)] == [40]
    expected = logits_of(model, make_theirs(model), TEXT[:30])[20:]
    fork.rewind(3)
    logits_of(model, fork, TEXT[17:20])
    assert difference(logits_of(model, fork, TEXT[20:30]), expected) <= EXACT * mx.std(expected)
    cache.rewind_to(20)
    assert difference(logits_of(model, cache, TEXT[20:30]), expected) <= EXACT * mx.std(expected)


def test_a_module_that_is_wrapped_after_the_trial() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.inner = inner

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = build("lfm2")
    expected = logits_of(model, make_theirs(model), TEXT[:35])[27:]
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:20])
    model.layers[0].conv = Wrapper(model.layers[0].conv)
    logits_of(model, cache, TEXT[20:40])
    cache.rewind(13)
    assert difference(logits_of(model, cache, TEXT[27:35]), expected) <= EXACT * mx.std(expected)


def test_a_model_that_has_been_freed() -> None:
    model = build("lfm2")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:20])
    del model
    gc.collect()
    with pytest.raises(CacheError, match="has been freed"):
        cache.rewind(3)
    assert cache.position == 20
    cache.rewind(20)


def test_classes_of_modules_are_restored() -> None:
    model = build("lfm2")
    before = [type(module) for module in model.modules()]
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:20])
    assert [type(module) for module in model.modules()] != before
    assert isinstance(model.layers[0].conv, lfm2.ShortConv)
    copied = copy.deepcopy(model.layers[0].conv)
    assert type(copied) is lfm2.ShortConv
    del cache
    gc.collect()
    assert [type(module) for module in model.modules()] == before
