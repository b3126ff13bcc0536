"""Counts what a GPU's time depends on: primitives, Python calls and forced evaluations of a step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import base, llama
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

import mlx_kvcache
from benchmarks.counts import as_on_a_gpu, fused, primitives, python_calls, unevaluated
from benchmarks.hybrid import hybrid
from benchmarks.measure import speed, timed
from benchmarks.rows import Row, less
from benchmarks.setting import Setting
from benchmarks.shape import fill, read, shape_of
from mlx_kvcache.plugin import Many, make_prompt_cache
from tests.plugin.configurations import build

LAYERS, WINDOW = 12, 128
DEEP = 36
"""Layers of a model as deep as most: what a call takes weighs less there than what each layer takes."""
OWN = str(Path(mlx_kvcache.__file__).parent)
THEIRS = str(caches.__file__), str(base.__file__)
STEPS = 512
"""Steps in which forced evaluations are counted: buffers grow during them."""


class Case(NamedTuple):
    """A model, this package's caches and mlx-lm's for the same rows, and the number of rows.

    `stored` are caches that the rows were forked from and that live on.
    """

    work: str
    model: Any
    ours: Any
    theirs: Any
    peer: str
    rows: int = 1
    stored: Any = None

    def step(self, cache: Any) -> mx.array:
        """The logits of one more token in each row, not evaluated."""
        logits: mx.array = self.model(mx.array([[5]] * self.rows), cache=cache)
        return logits


def run(setting: Setting) -> Iterator[Row]:
    """Primitives, Python calls and evaluations of a decoded token on the path of a GPU, against mlx-lm."""
    with as_on_a_gpu():
        for key, make in CASES.items():
            yield from counted(key, make())
        for rows in (1, 8):
            yield from many(rows)
        for key in ("one", "batch.8", "batch.8.living"):
            yield from evaluations(key, setting.of(STEPS, STEPS // 8))
        for key, length in (("one", 256), ("one", 4096), ("batch.8", 256), ("batch.8", 4096)):
            if length == 256 or not setting.is_quick:
                yield _building(key, length, setting.of(60, 20))
        for key in ("one", "batch.8"):
            with patch(f"{__name__}.LAYERS", DEEP):
                yield _building(key, 256, setting.of(60, 5), f", {DEEP} layers", f".{DEEP}")


def counted(key: str, case: Case) -> tuple[Row, Row]:
    """The primitives and the Python calls of a case, both for each layer."""
    layers = len(case.model.layers)
    for cache in (case.ours, case.theirs):
        # The second step goes on from the first one, as most do.
        for _ in range(2):
            mx.eval(case.step(cache))
    calls = (
        python_calls(lambda: mx.eval(case.step(case.ours)), OWN),
        python_calls(lambda: mx.eval(case.step(case.theirs)), *THEIRS),
    )
    with fused(), unevaluated(case.ours):
        found = [sum(primitives(case.step(cache)).values()) for cache in (case.ours, case.theirs)]
    name = f"{case.work}, a layer"
    return (
        less(f"graph.{key}", f"primitives, {name}", "", found[0] / layers, case.peer, found[1] / layers),
        less(f"calls.{key}", f"Python calls, {name}", "", calls[0] / layers, case.peer, calls[1] / layers),
    )


def many(rows: int) -> tuple[Row, Row]:
    """The primitives and Python calls of a step of `Many`, with sampling, after its rows have joined."""
    model = _llama()
    ours, theirs = Many(model), BatchGenerator(model)
    for row in range(rows):
        prompt = [row + 7 * i % 50 for i in range(WINDOW // 3)]
        ours.add(prompt, STEPS)
        theirs.insert([prompt], [STEPS])
    found: list[int] = []

    def evaluate(*arrays: Any) -> None:
        found.append(sum(primitives(*(array for _, array in tree_flatten(arrays))).values()))
        original(*arrays)

    original: Any = mx.async_eval
    calls: list[int] = []
    for step, places in ((ours.step, (OWN,)), (theirs.next, (*THEIRS, inspect.getfile(BatchGenerator)))):
        for _ in range(40):
            step()
        calls.append(python_calls(step, *places))
        with fused(), patch.object(ours._pool, "is_scratch", True), patch.object(mx, "async_eval", evaluate):
            step()
    name = f"a step of {rows} sequence{'s' * (rows > 1)} with sampling, a layer"
    each = [count / LAYERS for count in (*found, *calls)]
    return (
        less(f"graph.many.{rows}", f"primitives, {name}", "", each[0], "BatchGenerator", each[1]),
        less(f"calls.many.{rows}", f"Python calls, {name}", "", each[2], "BatchGenerator", each[3]),
    )


def evaluations(key: str, steps: int) -> tuple[Row, Row]:
    """In how many steps the package waits for MLX, although nobody asks for a result, and how often."""
    keeps: list[Any] = []
    case = CASES["batch.8"](keeps) if key == "batch.8.living" else CASES[key]()
    kept = ", while the caches that they came from live" if keeps else ""
    found, original = list[int](), mx.eval

    def evaluate(*arrays: Any) -> None:
        found[-1] += sys._getframe(1).f_code.co_filename.startswith(OWN)
        original(*arrays)

    with patch.object(mx, "eval", evaluate):
        for _ in range(steps):
            found.append(0)
            mx.eval(case.step(case.ours))
    keeps.clear()
    waits, most = sum(map(bool, found)), max(found) / len(case.model.layers)
    work = case.work + kept
    return (
        Row(f"evaluations.{key}", f"steps of {steps} that evaluate arrays, {work}", "", waits),
        Row(f"evaluations.{key}.most", f"evaluations of a layer in one step at most, {work}", "", most),
    )


def _building(key: str, length: int, rounds: int, depth: str = "", end: str = "") -> Row:
    """The time to build a token's graph, which a GPU waits for where it is faster."""
    case = CASES[key](length=length)

    def seconds(cache: Any) -> float:
        found = []
        # Otherwise the pool begins to evaluate what it has built.
        with unevaluated(case.ours):
            taken = timed(lambda: found.append(case.step(cache)))
        mx.eval(found)
        return taken

    work = f"building a token's graph, {case.work}{depth}"
    return speed(
        f"graph.time.{key}.{length}{end}",
        work,
        "us",
        lambda: seconds(case.ours),
        case.peer,
        lambda: seconds(case.theirs),
        rounds,
    )


def _llama() -> Any:
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=128,
            num_hidden_layers=LAYERS,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=64,
        )
    )
    mx.eval(model.parameters())
    return model


def _one_row(keeps: Any = None, length: int = 512) -> Case:
    model, theirs = _llama(), [KVCache() for _ in range(LAYERS)]
    return _filled(f"one row after {length:,}", model, theirs, "KVCache", length)


def packed_row(bits: int = 8, dtype: mx.Dtype = mx.float32, **options: Any) -> Case:
    model, theirs = _llama(), [QuantizedKVCache(64, bits) for _ in range(LAYERS)]
    model.set_dtype(dtype)
    text = mx.ones((1, 40), mx.int32)
    ours = make_prompt_cache(model, kv_bits=bits, **options)
    for cache in (ours, theirs):
        read(model, cache, text, 40)
    of = "" if dtype == mx.float32 else " of bfloat16"
    return Case(f"one row in {bits} bits{of}", model, ours, theirs, "QuantizedKVCache")


def _window() -> Case:
    model = _llama()
    model.make_cache = lambda: [RotatingKVCache(WINDOW) for _ in range(LAYERS)]
    return _filled(
        f"one row in a window of {WINDOW}", model, model.make_cache(), "RotatingKVCache", 3 * WINDOW
    )


def _filled(work: str, model: Any, theirs: Any, peer: str, length: int) -> Case:
    shape = shape_of(model)
    for cache in (ours := make_prompt_cache(model), theirs):
        fill(cache, length, step=WINDOW, shape=shape)
    return Case(work, model, ours, theirs, peer)


def _read(work: str, model: Any) -> Case:
    text = mx.random.randint(0, 60, (1, 30), key=mx.random.key(0))
    for cache in (ours := make_prompt_cache(model), theirs := make_theirs(model)):
        read(model, cache, text, 30)
    return Case(work, model, ours, theirs, "mlx-lm's caches")


def _batch(
    name: str, lengths: list[int], kind: Any = None, dtype: mx.Dtype = mx.float32, **options: Any
) -> Callable[..., Case]:
    """A case of rows of several lengths.

    `keeps` gets the caches that the rows came from; `length` is for all rows.
    """

    def make(keeps: list[Any] | None = None, length: int | None = None) -> Case:
        model, wanted = _llama(), [length or n for n in lengths]
        model.set_dtype(dtype)
        shape, single = shape_of(model), (lambda: RotatingKVCache(WINDOW)) if kind else KVCache
        model.make_cache = lambda: [single() for _ in range(LAYERS)]

        def filled(make_cache: Callable[[], Any]) -> list[Any]:
            return [fill(make_cache(), n, seed, WINDOW, shape) for seed, n in enumerate(wanted)]

        own = filled(lambda: make_prompt_cache(model, **options))
        if keeps is not None:
            keeps += own
        other = filled(model.make_cache)
        batch = kind or BatchKVCache
        return Case(
            f"{len(lengths)} rows of {length:,}" if length else name,
            model,
            _merged(own),
            [batch.merge([cache[i] for cache in other]) for i in range(LAYERS)],
            batch.__name__,
            len(lengths),
        )

    return make


def _forks(prompts: int = 1, is_stored: bool = False, turn: int = 0) -> Callable[..., Case]:
    """8 forks of a prompt, or of several, each with 3 tokens of its own.

    What is stored lives on: the prompts and, with a turn of so many tokens, a conversation of each row.
    """

    def make() -> Case:
        model, rows, length = _llama(), 8, 512
        shape = shape_of(model)
        kept = [fill(make_prompt_cache(model), length, seed, shape=shape) for seed in range(prompts)]
        forks = [kept[row % prompts].fork() for row in range(rows)]
        if turn:
            kept += [fill(fork, turn, row, shape=shape) for row, fork in enumerate(forks)]
            forks = [fork.fork() for fork in forks]
        forks = [fill(fork, 3, row, shape=shape) for row, fork in enumerate(forks)]
        size = length + turn + 3
        other = [fill([KVCache() for _ in range(LAYERS)], size, shape=shape) for _ in range(rows)]
        theirs = [BatchKVCache.merge([cache[i] for cache in other]) for i in range(LAYERS)]
        what = f"{prompts} prompts" if prompts > 1 else "a prompt"
        named = f"{rows} forks of {what} of {length}" + f" and a turn of {turn}" * (turn > 0)
        case = Case(
            named + " that are stored" * is_stored, model, _merged(forks), theirs, "BatchKVCache", rows
        )
        return case._replace(stored=kept) if is_stored else case

    return make


def _fork() -> Case:
    """One fork of a prompt, which is stored and lives on."""
    model, length = _llama(), 512
    shape, theirs = shape_of(model), [KVCache() for _ in range(LAYERS)]
    kept = fill(make_prompt_cache(model), length, shape=shape)
    ours = fill(kept.fork(), 3, shape=shape)
    fill(theirs, length + 3, shape=shape)
    return Case(f"a fork of a prompt of {length} that is stored", model, ours, theirs, "KVCache", stored=kept)


def _merged(single: list[Any]) -> list[Any]:
    return [layer.merge([cache[i] for cache in single]) for i, layer in enumerate(single[0])]


CASES: dict[str, Callable[..., Case]] = {
    "one": _one_row,
    "window": _window,
    "chunks": lambda: _read("one row in chunks", build("llama4", is_dense=True)),
    "hybrid": lambda: _read("one row of a hybrid model", hybrid(128)),
    "fork": _fork,
    "packed": packed_row,
    "packed.4": lambda: packed_row(4),
    "packed.half": lambda: packed_row(8, mx.bfloat16),
    "packed.half.4": lambda: packed_row(4, mx.bfloat16),
    "batch.2": _batch("2 rows of 64", [64] * 2),
    "batch.8": _batch("8 rows of 64", [64] * 8),
    "batch.32": _batch("32 rows of 64", [64] * 32),
    "alike.8": _batch("8 rows of 57 to 64", [57 + i for i in range(8)]),
    "ragged.2": _batch("one row of 2,048 and one of 64", [2048, 64]),
    "ragged.8": _batch("one row of 2,048 and seven of 64", [2048] + [64] * 7),
    "ragged.32": _batch("32 rows of 16 to 512", [16 * (i + 1) for i in range(32)]),
    "windows.8": _batch(f"8 rows in windows of {WINDOW}", [384] * 8, BatchRotatingKVCache),
    "packed.8": _batch("8 rows of 64 in 8 bits", [64] * 8, kv_bits=8),
    "packed.8.half": _batch("8 rows of 64 in 8 bits of bfloat16", [64] * 8, dtype=mx.bfloat16, kv_bits=8),
    "forks.8": _forks(),
    "forks.stored": _forks(is_stored=True),
    "forks.stored.2": _forks(2, is_stored=True),
    "forks.stored.8": _forks(is_stored=True, turn=300),
}
"""What is counted, by key."""
