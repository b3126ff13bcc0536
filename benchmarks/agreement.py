"""Compares the logits of models in 16 bits with mlx-lm's own caches, on every kind of cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from benchmarks.hybrid import hybrid
from benchmarks.rows import Row
from mlx_kvcache.plugin import PromptCache, generate_many, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import greedy, logits_of, without

TEXT = [(17 * i * i + 29 * i + 5) % 89 + 3 for i in range(160)]
OTHER = [(31 * i * i + 7 * i + 11) % 83 + 5 for i in range(40)]
BLOCK, WINDOW = 48, 32

FLOORS = {mx.float16: 0.02, mx.bfloat16: 0.12, mx.float32: 0.002}
"""Distances from float32 that the rounding of a type explains, whatever the peer's distance is."""

Logits = Callable[["Models"], "Found"]


class Found(NamedTuple):
    """Logits of the same tokens: on these caches, on mlx-lm's own, and in float32."""

    ours: mx.array
    theirs: mx.array
    exact: mx.array


class Models:
    """A model in 16 bits, and the same weights in float32, which the CPU computes."""

    def __init__(self, make: Callable[[], nn.Module], dtype: mx.Dtype, block: int = 1) -> None:
        self._make, self.dtype, self._block = make, dtype, block

    @cached_property
    def model(self) -> nn.Module:
        return self._of(self.dtype)

    @cached_property
    def exact(self) -> nn.Module:
        with mx.stream(mx.cpu):
            return self._of(mx.float32)

    def _of(self, dtype: mx.Dtype) -> nn.Module:
        model = self._make()
        rounded = self.dtype
        model.update(
            tree_map(
                lambda a: a.astype(rounded).astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a,
                model.parameters(),
            )
        )
        mx.eval(model.parameters())
        return model

    def fresh(self, tokens: list[int], last: int) -> tuple[mx.array, mx.array]:
        """Logits of the last tokens of a text on mlx-lm's own caches, in 16 bits and in float32.

        Blocks of one token are exact for every kind of mlx-lm's caches.
        """
        theirs = logits_of(self.model, make_theirs(self.model), tokens, self._block)[-last:]
        with mx.stream(mx.cpu):
            exact = logits_of(self.exact, make_theirs(self.exact), tokens, self._block)[-last:]
        return theirs, exact


def going_on(models: Models) -> Found:
    """A prompt in blocks, and single tokens."""
    cache = make_prompt_cache(models.model)
    ours = [logits_of(models.model, cache, TEXT[:120], BLOCK), logits_of(models.model, cache, TEXT[120:], 1)]
    return Found(mx.concatenate(ours), *models.fresh(TEXT, len(TEXT)))


def rewinding(models: Models) -> Found:
    """Going back by 20 of 100 tokens, and on with others."""
    cache = make_prompt_cache(models.model)
    logits_of(models.model, cache, TEXT[:100], BLOCK)
    cache.rewind(20)
    ours = _read(models, cache, OTHER)
    return Found(ours, *models.fresh(TEXT[:80] + OTHER, len(OTHER)))


def forking(models: Models) -> Found:
    """A fork and its origin, which read different tokens."""
    cache = make_prompt_cache(models.model)
    logits_of(models.model, cache, TEXT[:80], BLOCK)
    fork, forked, own = cache.fork(), OTHER, OTHER[::-1]
    ours = [_read(models, fork, forked), _read(models, cache, own)]
    return _joined(ours, [models.fresh(TEXT[:80] + more, len(more)) for more in (forked, own)])


def files(models: Models) -> Found:
    """A conversation that goes on from a file."""
    cache = make_prompt_cache(models.model)
    logits_of(models.model, cache, TEXT[:80], BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "a.kvcache")
        loaded = PromptCache.load(Path(folder) / "a.kvcache", models.model)
    return Found(_read(models, loaded, OTHER), *models.fresh(TEXT[:80] + OTHER, len(OTHER)))


def equal_batch(models: Models) -> Found:
    """A batch of 4 rows of the same length."""
    return _batch(models, [[*TEXT[i : i + 70]] for i in range(4)])


def unequal_batch(models: Models) -> Found:
    """A batch of 5 rows of 5 to 130 tokens."""
    return _batch(models, [TEXT[:n] for n in (130, 5, 64, 20, 33)])


def large_batch(models: Models) -> Found:
    """A batch of 24 rows, of two lengths."""
    return _batch(models, [TEXT[i : i + (40 if i % 2 else 9)] for i in range(24)])


def shared_batch(models: Models) -> Found:
    """A batch of 6 forks of one prompt."""
    cache = make_prompt_cache(models.model)
    logits_of(models.model, cache, TEXT[:70], BLOCK)
    forks = []
    for i in range(6):
        forks.append(cache.fork())
        logits_of(models.model, forks[-1], OTHER[i : i + 3])
    return _decoded(models, forks, [TEXT[:70] + OTHER[i : i + 3] for i in range(6)])


def removal(models: Models) -> Found:
    """30 tokens taken out of the middle, against mlx-lm's keys rotated by hand."""
    cache = make_prompt_cache(models.model)
    logits_of(models.model, cache, TEXT[:100], BLOCK)
    cache.remove(20, 50)
    ours = _read(models, cache, OTHER)

    def by_hand(model: Any) -> mx.array:
        whole: list[Any] = make_theirs(model)
        logits_of(model, whole, TEXT[:100], BLOCK)
        rope = model.layers[0].self_attn.rope
        return logits_of(model, without(whole, 20, 50, rope.dims, rope.base, rope.traditional), OTHER, 1)

    theirs = by_hand(models.model)
    with mx.stream(mx.cpu):
        return Found(ours, theirs, by_hand(models.exact))


def shifting(models: Models) -> Found:
    """Text without end: the oldest tokens are dropped, and later keys are moved; against float32 here."""

    def endless(model: Any) -> mx.array:
        cache = make_prompt_cache(model, capacity=64, overflow="shift", rewind=0, sinks=4)
        return mx.concatenate(
            [logits_of(model, cache, TEXT[:60]), logits_of(model, cache, TEXT[60:] + OTHER, 4)]
        )

    ours = endless(models.model)
    with mx.stream(mx.cpu):
        exact = endless(models.exact)
    return Found(ours, exact, exact)


def quantized(models: Models) -> Found:
    """Keys and values in 8 bits, against QuantizedKVCache."""
    ours = make_prompt_cache(models.model, kv_bits=8)
    theirs = [QuantizedKVCache(64, 8) for _ in models.model.layers]
    logits_of(models.model, ours, TEXT[:120], BLOCK)
    logits_of(models.model, theirs, TEXT[:120], BLOCK)
    n = len(TEXT) - 120
    return Found(
        logits_of(models.model, ours, TEXT[120:], 1),
        logits_of(models.model, theirs, TEXT[120:], 1),
        models.fresh(TEXT, n)[1],
    )


def quantized_batch(models: Models) -> Found:
    """A batch of 5 unequal rows in 8 bits, against rows in float."""
    return _batch(models, [TEXT[:n] for n in (130, 5, 64, 20, 33)], kv_bits=8)


def generated(models: Models) -> Found:
    """Text of `generate_many`: how far its tokens' logits in float32 are below the best ones."""
    prompts, new = [TEXT[:n] for n in (60, 9, 33)], 8
    ours: list[list[int]] = [[] for _ in prompts]
    for result in generate_many(models.model, prompts, new):
        if result.token is not None:
            ours[result.ticket].append(result.token)
    theirs = [greedy(models.model, prompt, new) for prompt in prompts]

    def chosen(texts: list[list[int]]) -> tuple[mx.array, mx.array]:
        below, best = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            exact = models.fresh([*prompt, *text], new + 1)[1][:-1]
            highest = exact.max(axis=-1, keepdims=True)
            token = mx.take_along_axis(exact, mx.array(text)[:, None], axis=-1)
            best.append(exact)
            below.append(exact + (token - highest))
        return mx.concatenate(below), mx.concatenate(best)

    own, best = chosen(ours)
    other, their_best = chosen(theirs)
    # Both are shifted onto the same logits, so that only the distances from the best count.
    return Found(own, other - their_best + best, best)


FULL = {
    "going on": going_on,
    "rewinding": rewinding,
    "forks": forking,
    "equal rows": equal_batch,
    "unequal rows": unequal_batch,
    "many rows": large_batch,
    "shared prefix": shared_batch,
    "removal": removal,
    "shifting": shifting,
    "files": files,
    "quantized": quantized,
    "quantized rows": quantized_batch,
    "generated text": generated,
}
"""Checks by name, for a model whose layers attend to everything."""
LESS = ("going on", "rewinding", "forks", "equal rows", "unequal rows", "shared prefix", "files")
"""The checks that other kinds of cache get."""


def _llama(**changes: Any) -> nn.Module:
    mx.random.seed(0)
    model: nn.Module = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=256,
            num_hidden_layers=4,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=96,
            rope_theta=10000.0,
            **changes,
        )
    )
    return model


def _windowed() -> nn.Module:
    return _llama(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=WINDOW)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "full": _llama,
    "window": _windowed,
    "hybrid": lambda: hybrid(256, 4),
    "latent": lambda: build("deepseek_v3", is_wide=True, is_dense=True),
    "chunks": lambda: build("llama4", is_wide=True, is_dense=True),
    "recurrent": lambda: build("mamba2"),
    "learned sinks": lambda: build("gpt_oss", is_wide=True),
}
"""Models by the kind of their caches."""
ONE_BY_ONE = ("chunks", "learned sinks")
"""Models for which mlx-lm's own caches are exact token by token only."""
EXPERTS = ("learned sinks",)
"""Models with experts, which MLX computes in 16 bits on a GPU only."""


def models_of(kind: str, dtype: mx.Dtype) -> Models:
    return Models(MAKERS[kind], dtype, 1 if kind in ONE_BY_ONE else 16)


class Check(NamedTuple):
    """One comparison: its key and title, and a function that makes it."""

    key: str
    work: str
    row: Callable[[], Row]


def checks(is_quick: bool) -> Iterator[Check]:
    """Every check, by kind of cache and type of numbers."""
    kinds = ["full", "window"] if is_quick else list(MAKERS)
    for kind in kinds:
        if kind in EXPERTS and mx.default_device().type == mx.cpu:
            continue
        for dtype in (mx.float16,) if is_quick else (mx.float16, mx.bfloat16):
            models, number = models_of(kind, dtype), str(dtype).removeprefix("mlx.core.")
            for name, find in FULL.items():
                if kind == "full" or name in LESS:
                    key = f"agreement.{kind}.{name}.{number}".replace(" ", "_")
                    work = f"{name}, {kind}, {number}"
                    yield Check(key, work, partial(_checked, key, work, find, models))


def _checked(key: str, work: str, find: Logits, models: Models) -> Row:
    return compared(key, work, find(models), models.dtype)


def compared(key: str, work: str, found: Found, dtype: mx.Dtype) -> Row:
    """The distances from float32.

    Raises:
        ArithmeticError: these caches are further away than twice the peer's distance, and further than
            rounding explains.
    """
    ours, theirs = distance(found.ours, found.exact), distance(found.theirs, found.exact)
    floor = FLOORS[dtype]
    limit = min(max(2 * theirs, floor), 4 * floor)
    # Negated so that NaN is an error, too.
    if not ours <= limit:
        raise ArithmeticError(
            f"{work}: {ours:.2g} of the logits' deviation away from float32; mlx-lm's caches {theirs:.2g}, "
            f"at most {limit:.2g} expected"
        )
    return Row(key, work, "distance from float32", ours, "mlx-lm's caches", theirs, "value")


def distance(a: mx.array, b: mx.array) -> float:
    """The largest root mean square difference of a token's logits, by the deviation of all of `b`."""
    with mx.stream(mx.cpu):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        worst: Any = (mx.sqrt(((a - b) ** 2).mean(axis=-1)).max() / mx.sqrt(mx.var(b))).tolist()
    return float(worst)


def _read(models: Models, cache: Any, tokens: list[int]) -> mx.array:
    """Logits of tokens, read as a block and one by one."""
    half = len(tokens) // 2
    return mx.concatenate(
        [logits_of(models.model, cache, tokens[:half]), logits_of(models.model, cache, tokens[half:], 1)]
    )


def _batch(models: Models, texts: list[list[int]], **options: Any) -> Found:
    """Rows that were read alone and decode together."""
    caches = []
    for text in texts:
        caches.append(make_prompt_cache(models.model, **options))
        logits_of(models.model, caches[-1], text, BLOCK)
    return _decoded(models, caches, texts)


def _decoded(models: Models, caches: list[Any], texts: list[list[int]]) -> Found:
    """Steps of a batch; after half of them every second row leaves."""
    batch: list[Any] = [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]
    rows, steps = list(range(len(texts))), 8
    ours: list[list[mx.array]] = [[] for _ in rows]
    for step in range(steps):
        if step == steps // 2:
            kept = rows[::2]
            for layer in batch:
                layer.filter(mx.array(kept))
            rows = kept
        logits = models.model(mx.array([[OTHER[step + row % 4]] for row in rows]), cache=batch)
        mx.eval(logits)
        for at, row in enumerate(rows):
            ours[row].append(logits[at])
    expected = [
        models.fresh(text + OTHER[row % 4 : row % 4 + len(own)], len(own))
        for row, (text, own) in enumerate(zip(texts, ours, strict=True))
    ]
    return _joined([mx.concatenate(own) for own in ours], expected)


def _joined(ours: list[mx.array], expected: list[tuple[mx.array, mx.array]]) -> Found:
    theirs, exact = zip(*expected, strict=True)
    with mx.stream(mx.cpu):
        exact_all = mx.concatenate(list(exact))
    return Found(mx.concatenate(ours), mx.concatenate(list(theirs)), exact_all)
