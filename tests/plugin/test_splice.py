"""Caches that go on to changed prompts, and keep what moved.

A model of one layer computes keys and values from a token and its position alone, so there a splice is exact,
and logits must equal those of a fresh computation.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import RotatingKVCache

from mlx_kvcache import CacheError, CacheFullError
from mlx_kvcache.plugin import Many, PromptCache, attach, make_prompt_cache
from tests.plugin.running import deviation, difference, greedy, logits_of, model_of, plain
from tests.plugin.tiny import VOCABULARY, tiny_deepseek_v3, tiny_gpt2, tiny_llama

ONE_LAYER = tiny_llama(num_hidden_layers=1)
LLAMA = tiny_llama()


def drawn(random: Random, n: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(n)]


def changed(random: Random, before: list[int], changes: int = 3) -> list[int]:
    after = list(before)
    for _ in range(changes):
        begin, n = random.randrange(len(after)), random.randint(1, 40)
        kind = random.choice(["remove", "insert", "replace"])
        new = drawn(random, 0 if kind == "remove" else n if kind == "replace" else random.randint(1, 20))
        after[begin : begin if kind == "insert" else begin + n] = new
    return after or drawn(random, 1)


def read(model: nn.Module, tokens: list[int], **options: Any) -> PromptCache:
    cache = make_prompt_cache(model, **options)
    logits_of(model, cache, tokens, 64)
    return cache


def fresh(model: nn.Module, tokens: list[int]) -> mx.array:
    return logits_of(model, plain(model), tokens, 64)[-1]


@pytest.mark.parametrize("seed", range(12))
def test_through_one_layer_a_splice_is_exact(seed: int) -> None:
    random = Random(seed)
    before = drawn(random, random.randint(1, 300))
    cache = read(ONE_LAYER, before)
    for _ in range(3):
        after = changed(random, before)
        splice = cache.splice(before, after, min_run=random.choice([1, 8, 64]))
        assert splice.kept + len(splice.rest) == len(after) and splice.rest
        assert [after[i] for piece in splice.pieces for i in piece] == splice.rest
        done, logits = 0, None
        while done < len(splice.rest):
            block = splice.rest[done : done + random.choice([1, 2, 7, 100])]
            logits = logits_of(ONE_LAYER, cache, block)[-1]
            done += len(block)
        assert logits is not None and cache.position == len(after)
        assert difference(logits, fresh(ONE_LAYER, after)) <= 2e-5
        probe = drawn(random, 3)
        assert difference(logits_of(ONE_LAYER, cache, probe), after_text(after, probe)) <= 2e-5
        cache.rewind_to(len(after))
        cache.pool.caches[0].check()
        before = after


def after_text(text: list[int], probe: list[int]) -> mx.array:
    cache = plain(ONE_LAYER)
    logits_of(ONE_LAYER, cache, text, 64)
    return logits_of(ONE_LAYER, cache, probe)


def test_what_is_kept_and_what_is_computed() -> None:
    text = drawn(Random(1), 260)
    before, after = text, [*text[:20], 1, 2, 3, *text[30:120], *text[160:250]]
    cache = read(LLAMA, before)
    splice = cache.splice(before, after, min_run=64)
    assert [tuple(run) for run in splice.runs] == [(0, 0, 20), (30, 23, 90), (160, 113, 89)]
    assert splice.pieces == (range(20, 23), range(202, 203)) and splice.rest == [1, 2, 3, text[249]]
    assert (splice.kept, splice.moved, splice.refusal) == (199, 179, None)
    assert cache.position == 20
    logits_of(LLAMA, cache, splice.rest[:3])
    assert cache.position == 23
    logits_of(LLAMA, cache, splice.rest[3:])
    assert cache.position == len(after)


def test_computing_all_again_is_exact() -> None:
    random = Random(2)
    before = drawn(random, 200)
    after = before[:50] + before[60:]
    kept = [read(LLAMA, before) for _ in range(3)]
    differences = []
    for cache, recompute in zip(kept, (0.0, 0.25, 1.0), strict=True):
        splice = cache.splice(before, after, 32, recompute)
        differences.append(difference(logits_of(LLAMA, cache, splice.rest)[-1], fresh(LLAMA, after)))
        assert splice.moved == {0.0: 139, 0.25: 104, 1.0: 0}[recompute]
    assert differences[2] <= 2e-5 < min(differences[:2])


def test_keys_that_do_not_move_are_shared() -> None:
    before = drawn(Random(3), 300)
    after = [*before[:100], 1, 2, 3, *before[103:], 4]
    cache = read(LLAMA, before)
    nbytes = cache.pool.nbytes
    splice = cache.splice(before, after)
    assert splice.rest == [1, 2, 3, 4]
    logits_of(LLAMA, cache, splice.rest)
    # The three new tokens begin a segment, and so does the last.
    assert cache.pool.nbytes - nbytes <= 2 * 64 * nbytes // 320


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_keys_are_rotated_once_in_float32(dtype: mx.Dtype) -> None:
    """Exact but for one rounding of the keys that move."""
    model = tiny_llama(dtype, num_hidden_layers=1)
    before = drawn(Random(4), 150)
    after = [5, *before]
    cache, expected = read(model, before), read(model, after)
    logits_of(model, cache, cache.splice(before, after, 32).rest)
    ours, theirs = (entry.state[0].astype(mx.float32) for entry in (cache[0], expected[0]))
    epsilon = {mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
    assert (mx.abs(ours - theirs) <= 2 * epsilon * mx.abs(theirs).max()).all().item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (tiny_deepseek_v3(1), {}),
        lambda: (ONE_LAYER, {"kv_bits": 8, "kv_group_size": 32}),
        lambda: (tiny_llama(num_hidden_layers=1, rope_traditional=True), {}),
    ],
    ids=["latents", "8 bits", "traditional"],
)
def test_other_stores(make: Any) -> None:
    model, options = make()
    if options:
        model = tiny_llama(num_hidden_layers=1, hidden_size=128)
    random = Random(5)
    before = drawn(random, 200)
    after = before[:70] + drawn(random, 5) + before[90:]
    cache = read(model, before, **options)
    splice = cache.splice(before, after, 16)
    assert splice.moved == 109
    expected = read(model, after, **options)
    mine = logits_of(model, cache, [*splice.rest, 7])[-1]
    assert deviation(mine, logits_of(model, expected, [7])[-1]) <= (0.1 if options else 2e-5)


def test_windows_keep_what_they_hold() -> None:
    """The newest tokens of a window are there, so the last run can stay; earlier ones are computed."""
    model = tiny_llama(num_hidden_layers=1)
    model.make_cache = lambda: [RotatingKVCache(8)]
    before = drawn(Random(6), 100)
    afters = {
        36: [*before[:60], *before[64:], 3],
        # A window of 8 that can go back by 48 tokens does not hold those at 24 to 40.
        51: [*before[:20], *before[24:40], 1, 2, *before[49:], 3],
    }
    for moved, after in afters.items():
        cache = read(model, before, rewind=48)
        splice = cache.splice(before, after, 8)
        assert (splice.moved, splice.refusal) == (moved, None)
        logits = logits_of(model, cache, splice.rest)[-1]
        assert difference(logits, logits_of(model, read(model, after[:-1]), [3])[-1]) <= 2e-5


def test_batches_divide_only_rows_that_tokens_join() -> None:
    random = Random(7)
    texts = [drawn(random, 120) for _ in range(3)]
    afters = [[*texts[0][:30], 9, *texts[0][40:], 1, 2], [*texts[1], 3, 4, 5], [*texts[2][5:], 6]]
    with attach(ONE_LAYER):
        batch = BatchGenerator(ONE_LAYER, max_tokens=6)
        caches = [read(ONE_LAYER, text) for text in texts]
        splices = [c.splice(b, a, 16) for c, b, a in zip(caches, texts, afters, strict=True)]
        assert [splice.moved for splice in splices] == [80, 0, 115]
        batch.insert([splice.rest for splice in splices], caches=caches)
        replies: dict[int, list[int]] = {}
        while len(replies) < 3 or any(len(reply) < 6 for reply in replies.values()):
            for response in batch.next()[1]:
                replies.setdefault(response.uid, []).append(response.token)
    assert [replies[uid] for uid in sorted(replies)] == [greedy(ONE_LAYER, after, 6, 32) for after in afters]


def test_many() -> None:
    random = Random(8)
    text = drawn(random, 150)
    after = text[:40] + drawn(random, 30) + text[60:]
    many = Many(ONE_LAYER, tokens_per_step=8)
    cache = read(ONE_LAYER, text)
    splice = cache.splice(text, after, 16)
    tickets = [many.add(splice.rest, 5, cache), many.add(after, 5)]
    replies: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    while len(many):
        for one in many.step():
            assert one.error is None and one.token is not None
            replies[one.ticket].append(one.token)
    assert splice.moved == 89
    assert replies[tickets[0]] == replies[tickets[1]] == greedy(ONE_LAYER, after, 5, 32)


def test_while_tokens_wait() -> None:
    before = drawn(Random(9), 150)
    after = [*before[:30], 1, 2, 3, 4, *before[50:]]
    cache = read(ONE_LAYER, before)
    splice = cache.splice(before, after)
    logits_of(ONE_LAYER, cache, splice.rest[:2])
    again = cache.fork()
    other = again.splice(after[:32], [*after[:32], 5])
    assert (other.kept, other.rest) == (32, [5])
    logits = logits_of(ONE_LAYER, again, [5, 6, 7, 8])[-1]
    assert difference(logits, fresh(ONE_LAYER, [*after[:32], 5, 6, 7, 8])) <= 2e-5
    ended = cache.fork()
    ended.end_splice()
    ended.remove(0, 30)
    assert difference(logits_of(ONE_LAYER, ended, after[32:36])[-1], fresh(ONE_LAYER, after[30:36])) <= 2e-5
    with pytest.raises(CacheError, match="wait to join"):
        cache.remove(0, 5)
    # Forks wait for the same tokens, and going back to before them changes nothing.
    fork = cache.fork()
    cache.rewind_to(30)
    logits_of(ONE_LAYER, cache, [1])
    for own, rest in ((fork, splice.rest[2:]), (cache, splice.rest[1:])):
        assert difference(logits_of(ONE_LAYER, own, rest)[-1], fresh(ONE_LAYER, after)) <= 2e-5
    # Before what has joined, too: then it is computed like other tokens.
    cache.rewind_to(33)
    logits = logits_of(ONE_LAYER, cache, after[33:])[-1]
    assert difference(logits, fresh(ONE_LAYER, after)) <= 2e-5


def test_layers_driven_by_hand_cannot_let_tokens_join() -> None:
    before = drawn(Random(10), 150)
    cache = read(ONE_LAYER, before)
    cache.splice(before, [1, 2, *before[5:]])
    logits_of(ONE_LAYER, cache, [1, 2])
    with pytest.raises(CacheError, match="call the model"):
        cache[0].make_mask(1)
    assert cache.position == 2


class _Busy(nn.Module):
    """A layer that also does something else whenever it is called."""

    def __init__(self, inner: nn.Module, act: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner, self.act = inner, act

    def __call__(self, *args: Any) -> Any:
        self.act()
        return self.inner(*args)


def test_a_splice_inside_a_call_of_the_model_undoes_the_call() -> None:
    model, before = tiny_llama(num_hidden_layers=1), drawn(Random(13), 150)
    after, layer = [1, *before[5:]], model.model.layers[0]
    cache = read(model, before)
    # The first time that keys move, the model is called to find its rotation.
    cache.fork().splice(before, after)
    other, plain, rests = cache.fork(), layer.mlp, list[list[int]]()
    layer.mlp = _Busy(plain, lambda: rests.append(other.splice(before, after).rest))
    with pytest.raises(CacheError, match="inside the model's call"):
        model(mx.array([[5]]), cache=cache)
    layer.mlp = plain
    assert cache.position == len(before)
    assert difference(logits_of(model, other, rests[0])[-1], fresh(model, after)) <= 2e-5
    assert difference(logits_of(model, cache, [5])[-1], fresh(model, [*before, 5])) <= 2e-5


@pytest.mark.parametrize("name", ["learned positions", "states"])
def test_models_whose_tokens_cannot_move(name: str) -> None:
    model = tiny_gpt2() if name == "learned positions" else model_of("qwen3_next")
    before = [token % 32 for token in drawn(Random(11), 40)]
    cache = read(model, before)
    after = [*before[:10], *before[12:]]
    splice = cache.splice(before, after, 8)
    assert splice.refusal and splice.moved == 0 and cache.position + len(splice.rest) == len(after)
    logits = logits_of(model, cache, splice.rest)[-1]
    assert difference(logits, logits_of(model, read(model, after[:-1]), after[-1:])[-1]) <= 2e-4


@pytest.mark.parametrize(
    ("before", "after", "options", "error", "message"),
    [
        (9, [1], {}, ValueError, "before has 9 tokens, but the cache holds 10"),
        (10, [], {}, ValueError, "after has 0 tokens"),
        (10, [1], {"min_run": 0}, ValueError, "min_run"),
        (10, [1], {"recompute": 1.5}, ValueError, "between 0.0 and 1.0, got 1.5"),
        (10, [1], {"recompute": float("nan")}, ValueError, "between 0.0 and 1.0, got nan"),
        (10, [1], {"recompute": "all"}, TypeError, "recompute must be a number .* got 'all'"),
        (10, list(range(33)), {}, CacheFullError, "33"),
        (10, "text", {}, TypeError, "after"),
    ],
)
def test_bad_input_changes_nothing(
    before: int, after: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    text = drawn(Random(12), 10)
    cache = read(LLAMA, text, capacity=32)
    with pytest.raises(error, match=message):
        cache.splice(text[:before], after, **options)
    assert cache.position == 10
    assert difference(logits_of(LLAMA, cache, [1])[-1], fresh(LLAMA, [*text, 1])) <= 2e-5
