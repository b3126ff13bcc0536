"""Prompt caches as files, of this package and of mlx-lm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache import CacheError, CacheFileError, CacheFullError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache, make_session_pool
from tests.persist.samples import Change
from tests.plugin.configurations import WINDOW, build
from tests.plugin.running import difference, logits_of
from tests.plugin.test_quantized import GROUP, model_of
from tests.plugin.tiny import tiny_llama

TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]
SOME = ["llama", "llama:window", "gemma3_text", "deepseek_v32", "llama4", "qwen3_next", "baichuan_m1"]
"""Full, windows, a latent with an index beside it, chunks, recurrences, and lists of caches."""
STORAGE: list[dict[str, Any]] = [
    {},
    {"kv_bits": (8, 4), "kv_group_size": GROUP, "kv_transform": "none"},
    {"kv_bits": (4, 6), "kv_group_size": GROUP},
    {"kv_bits": 4, "kv_group_size": GROUP, "kv_text": TEXT[::-1]},
]


def assert_goes_on(
    cache: PromptCache, other: PromptCache, model: nn.Module, tokens: Sequence[int] = tuple(TEXT[40:44])
) -> None:
    """Both compute the same, from where they are and from where the loaded one can go back to.

    A file has the checkpoints of recurrent layers, and one before the last token.
    """
    assert cache.position == other.position
    points = [other.resume_point(p) for p in range(cache.position + 1)]
    if cache.pool.layout.is_recurrent:
        assert {points[-1], points[-2]} == {cache.position, cache.position - 1}
        assert all(cache.can_resume(point) for point in points)
    else:
        assert points == [cache.resume_point(p) for p in range(cache.position + 1)]
    for point in {points[-1], points[len(points) * 3 // 4]}:
        results = []
        for each in (cache, other):
            fork = each.fork()
            fork.rewind_to(point)
            results.append(logits_of(model, fork, list(tokens)))
        assert difference(*results) <= 1e-6 * mx.std(results[0])


@pytest.mark.parametrize("storage", STORAGE, ids=["float", "packed", "transformed", "centered"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "lazy"])
@pytest.mark.parametrize("name", SOME)
def test_what_is_loaded_goes_on_as_what_was_saved(
    name: str, storage: dict[str, Any], verify: bool, tmp_path: Path
) -> None:
    """A branch that has its beginning from another, after going back."""
    model, path = model_of(name), tmp_path / "chat.safetensors"
    cache = make_prompt_cache(model, rewind=12, **storage)
    logits_of(model, cache, TEXT[:17])
    cache = cache.fork()
    logits_of(model, cache, TEXT[17:25], 3)
    cache.rewind_to(cache.resume_point(23))
    tokens = list(range(cache.position))
    cache.save(path, tokens=tokens)
    loaded = PromptCache.load(path, model, verify=verify)
    assert loaded.tokens == tokens and loaded.is_verified == verify
    assert loaded.pool is cache.pool
    assert_goes_on(cache, loaded, model)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_removals_go_on_without_drift(bits: int | None, tmp_path: Path) -> None:
    """What was first stored of the tokens before a gap is in the file."""
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=bits)
    logits_of(model, cache, TEXT[:50])
    cache.remove(8, 12)
    cache.save(tmp_path / "a")
    loaded = PromptCache.load(tmp_path / "a", model)
    for each in (cache, loaded):
        for _ in range(5):
            each.remove(6, 8)
    assert_goes_on(cache, loaded, model)
    assert loaded[0].offset == cache[0].offset > loaded.position


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 100},
        {"capacity": 44, "overflow": "shift", "sinks": 2},
        {"kv_bits": 4, "kv_group_size": 32},
        {"kv_bits": None},
        {"quantize_after": 100},
    ],
)
def test_into_other_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=(8, 8), capacity=60)
    logits_of(model, cache, TEXT[:40])
    cache.save(tmp_path / "a")
    loaded = PromptCache.load(tmp_path / "a", model, **options)
    assert loaded.capacity == options.get("capacity", 60)
    ours, theirs = (logits_of(model, each.fork(), TEXT[40:44]) for each in (cache, loaded))
    # What comes after loading is stored as the options say.
    limit = {4: 1.5, None: 0.05}.get(options.get("kv_bits", 8), 0.05 if "quantize_after" in options else 1e-5)
    assert difference(ours, theirs) <= limit * mx.std(ours)
    assert loaded.pool is make_prompt_cache(model, **({"kv_bits": 8, "capacity": 60} | options)).pool
    with pytest.raises(
        CacheFullError, match=r"40 cells needed, 39 free of a capacity of 39: .* holds 40 tokens"
    ):
        PromptCache.load(tmp_path / "a", model, capacity=39)


@pytest.mark.parametrize("given", [{"capacity": None}, {"overflow": "error"}, {"capacity": 60, "sinks": 4}])
def test_options_without_those_that_they_need(given: dict[str, Any], tmp_path: Path) -> None:
    """What a file says of a shift is left out where there is none any more."""
    model = tiny_llama()
    cache = make_prompt_cache(model, capacity=50, overflow="shift", sinks=2)
    logits_of(model, cache, TEXT[:40])
    cache.save(tmp_path / "a")
    loaded = PromptCache.load(tmp_path / "a", model, **given)
    assert loaded._conversation.limits[:3] in ((None, "error", 0), (50, "error", 0), (60, "shift", 4))
    with pytest.raises(ValueError, match="sinks=4 is the number of first tokens that a shift keeps"):
        PromptCache.load(tmp_path / "a", model, capacity=None, sinks=4)


def test_a_file_with_sinks_and_no_shift(tmp_path: Path) -> None:
    """As older versions let one make."""
    from tests.persist.test_files import lie

    model, path = tiny_llama(), tmp_path / "a"
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:10])
    cache.save(path)
    lie(path, lambda header, arrays: header["options"].update(sinks=4, overflow="shift"))
    assert_goes_on(cache, PromptCache.load(path, model), model)


def test_saving_and_loading_beside_another_thread(tmp_path: Path) -> None:
    """A fork goes on in the meantime; what is shared is evaluated by one thread at a time."""
    model, path = tiny_llama(), tmp_path / "a"
    cache = make_prompt_cache(model)
    expected = logits_of(model, cache, TEXT[:40])
    fork, failures = cache.fork(), list[BaseException]()

    def generate() -> None:
        try:
            for i in range(60):
                with fork.pool.lock:
                    mx.eval(model(mx.array([[i]]), cache=fork))
        except BaseException as error:  # noqa: BLE001  # it is shown below
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    for _ in range(15):
        cache.save(path, tokens=TEXT[:40])
        loaded = PromptCache.load(path, model)
        with fork.pool.lock:
            loaded.rewind(1)
            assert difference(logits_of(model, loaded, TEXT[39:40]), expected[-1:]) <= 1e-5
    thread.join()
    assert not failures and fork.position == 100


class Words:
    """As much of a tokenizer as tells it from others."""

    chat_template = "{{ messages }}"

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_a_file_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "a"
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:9])
    cache.save(path, tokenizer=Words("a", "b"))
    before = cache.pool.nbytes
    assert PromptCache.load(path, model).position == 9
    assert PromptCache.load(path, tiny_llama(), tokenizer=Words("a", "b")).position == 9
    other_weights = tiny_llama()
    other_weights.model.embed_tokens.weight = other_weights.model.embed_tokens.weight * 1.01
    for other, tokenizer, what in (
        (tiny_llama(rms_norm_eps=1e-6), None, "configuration"),
        (tiny_llama(mx.float16), None, "weights"),
        (other_weights, None, "weights"),
        (build("llama"), None, "configuration"),
        (build("qwen2"), None, "architecture"),
        (model, Words("a", "c"), "tokenizer"),
    ):
        with pytest.raises(CacheFileError, match=f"of another model: its {what} is"):
            PromptCache.load(path, other, tokenizer=tokenizer)
    assert cache.pool.nbytes == before


def test_what_cannot_be_written_or_read(tmp_path: Path) -> None:
    saving: Any
    model = tiny_llama()
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:9])
    cache.save(tmp_path / "a", tokens=range(9))
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="token -3 is out of range"):
        cache.save(tmp_path / "a", tokens=range(-3, 6))
    with pytest.raises(ValueError, match="8 tokens for a sequence of 9"):
        cache.save(tmp_path / "a", tokens=range(8))
    unknown: Any = "pickle"
    with pytest.raises(ValueError, match="format must be"):
        cache.save(tmp_path / "a", format=unknown)
    for saving in ({}, {"format": "mlx-lm"}):
        with pytest.raises(CacheFileError, match="cannot be written"):
            cache.save(tmp_path / "missing" / "a", **saving)
    assert (tmp_path / "a").read_bytes() == before
    with pytest.raises(CacheFileError, match="cannot be read: No such file"):
        PromptCache.load(tmp_path / "b", model)
    cache.close()
    with pytest.raises(CacheError, match="closed"):
        cache.save(tmp_path / "a")


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("format_", ["mlx_kvcache", "mlx-lm"])
def test_a_window_that_could_not_shift_is_refused_when_it_is_loaded(
    format_: Any, sinks: int, tmp_path: Path
) -> None:
    """What is loaded can shift; what could not is refused before anything is generated with it."""
    model, path = model_of("llama:window"), tmp_path / "a.safetensors"
    refused = set[str]()
    for held in (WINDOW + 3, 2 * WINDOW - 2):
        cache = make_prompt_cache(model, rewind=1)
        for i in range(held):
            logits_of(model, cache, TEXT[i : i + 1])
        cache.save(path, format=format_)
        for capacity in (*range(held, 3 * WINDOW), 5 * WINDOW):
            options: dict[str, Any] = {"capacity": capacity, "overflow": "shift", "sinks": sinks}
            try:
                loaded = PromptCache.load(path, model, **options)
            except CacheFileError as error:
                refused.add(error.reason)
                continue
            for token in range(capacity - held + 1):
                logits_of(model, loaded, [token % 90])
            assert loaded.gaps == 1
            loaded.close()
    assert bool(refused) == bool(sinks)
    assert all("no longer holds tokens" in reason and "needs when it shifts" in reason for reason in refused)


@pytest.mark.parametrize(
    ("name", "nearest"), [("kvbits", "kv_bits"), ("max_kv_size", "capacity"), ("sink", "sinks")]
)
def test_an_option_that_there_is_not(name: str, nearest: str, tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "a"
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:3])
    cache.save(path)
    options: dict[str, Any] = {name: 4}
    told = f"has no option {name}; .*{nearest}"
    with pytest.raises(TypeError, match=told):
        PromptCache.load(path, model, **options)
    with pytest.raises(TypeError, match=told):
        make_session_pool(model, folder=tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()
    for tokenizer in ("gpt2", 3):
        with pytest.raises(TypeError, match=r"tokenizer must be one returned by mlx_lm\.load, got"):
            PromptCache.load(path, model, tokenizer)
    tokens: Any = [1.5] * 3
    with pytest.raises(TypeError, match="tokens must be whole numbers"):
        cache.save(path, tokens=tokens)


def in_thread(work: Callable[[], Any]) -> Any:
    """What a thread of its own returns, which has ended then."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("name", ["llama", "llama:window", "qwen3_next"])
@pytest.mark.parametrize("storage", [{}, {"kv_bits": 8, "kv_group_size": GROUP}], ids=["float", "packed"])
def test_what_one_thread_loads_others_use(
    name: str, verify: bool, storage: dict[str, Any], tmp_path: Path
) -> None:
    """MLX cannot evaluate a lazy array in another thread than the one that made it."""
    model = model_of(name)
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:20])
    cache.save(tmp_path / "ours")
    cache.save(tmp_path / "theirs.safetensors", format="mlx-lm")
    expected = logits_of(model, cache.fork(), TEXT[20:24])
    for path in ("ours", "theirs.safetensors"):
        loaded = in_thread(lambda: PromptCache.load(tmp_path / path, model, verify=verify, **storage))  # noqa: B023

        def use() -> mx.array:
            logits = logits_of(model, loaded.fork(), TEXT[20:24])  # noqa: B023
            mx.eval(logits)
            return logits

        for _ in range(2):
            assert difference(in_thread(use), expected) <= (0.5 if storage else 1e-5) * mx.std(expected)
        loaded.close()


def test_what_comes_from_a_folder_another_thread_uses(tmp_path: Path) -> None:
    model = tiny_llama()
    with make_session_pool(model, folder=tmp_path) as sessions, sessions.open(TEXT[:20]) as session:
        logits_of(model, session.cache, session.rest)
    sessions = in_thread(lambda: make_session_pool(model, folder=tmp_path))
    session = in_thread(lambda: sessions.open(TEXT[:24]))
    assert session.reused == 20
    for _ in range(2):
        in_thread(lambda: mx.eval(logits_of(model, session.cache.fork(), session.rest)))
    sessions.close()


def test_lies_about_options_and_what_is_before_a_gap_are_refused(tmp_path: Path) -> None:
    from tests.persist.test_files import lie

    model, path = tiny_llama(), tmp_path / "a"
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:30])
    cache.remove(4, 8)

    def head(key: str, value: Any) -> Change:
        return lambda header, arrays: header["options"]["head"].__setitem__(key, value)

    def piece(key: str, value: Any) -> Change:
        return lambda header, arrays: header["options"]["head"]["pieces"][0].__setitem__(key, value)

    for change in (
        head("lead", -1),
        head("pieces", {}),
        piece("span", [0, 9, 0]),
        piece("kind", 3),
        piece("lanes", [[0, 2, None]]),
        piece("lanes", [[9, 0, None]]),
        lambda header, arrays: header["caches"][0]["layers"].pop("1"),
    ):
        cache.save(path)
        lie(path, change)
        with pytest.raises(CacheFileError):
            PromptCache.load(path, model)
    for name, value in (
        ("capacity", "x"),
        ("capacity", -1),
        ("overflow", "drop"),
        ("sinks", True),
        ("kv_bits", 3),
        ("kv_bits", [[7, 7]] * 3),
        ("kv_bits", [{}, "x", [None]]),
        ("kv_bits", [[8, 8]] * 3),
    ):
        cache.save(path)
        lie(path, lambda header, arrays: header["options"].update({name: value}))  # noqa: B023
        with pytest.raises(CacheFileError):
            PromptCache.load(path, model)
    cache.save(path)
    assert_goes_on(cache, PromptCache.load(path, model), model)


@pytest.mark.parametrize("limit", [None, 5000])
def test_limits_of_checkpoints_are_saved(limit: int | None, tmp_path: Path) -> None:
    model, path = model_of("qwen3_next"), tmp_path / "chat.safetensors"
    cache = make_prompt_cache(model, checkpoints=3, checkpoint_bytes=limit)
    logits_of(model, cache, TEXT[:17])
    cache.save(path)
    limits = PromptCache.load(path, model)._conversation.limits
    assert (limits.checkpoints, limits.checkpoint_bytes) == (3, limit)
