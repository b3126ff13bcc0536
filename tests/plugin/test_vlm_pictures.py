"""Pictures in a prompt, on whole models of mlx-vlm with small random vision towers.

After every edit the logits equal those that the model computes afresh for the same prompt, with caches of
its own, and of another copy of the model where it keeps something on its module.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.generate import generate_step
from mlx_vlm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheFullError, NotSupportedError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache, make_session_pool, picture_key
from tests.plugin.configurations.vlm import VLM_WHOLE, build_vlm, picture
from tests.plugin.configurations.vlm.whole import IMAGE
from tests.plugin.running import difference

pytestmark = pytest.mark.usefixtures("without_compiling")
NAMES = [name for name in VLM_WHOLE if name != "mllama"]
MORE = [17, 3, 88, 41, 60, 25]
EXACT = 1e-4
"""In units of the logits' standard deviation."""


@lru_cache(maxsize=2)
def model_of(name: str) -> nn.Module:
    return build_vlm(name)


def prefill(model: Any, cache: list[Any], prompt: dict[str, Any]) -> mx.array:
    """Logits of a prompt with a picture, as mlx-vlm's `generate_step` computes them in one block."""
    given = {key: value for key, value in prompt.items() if key not in ("input_ids", "pixel_values", "mask")}
    found = model.get_input_embeddings(
        prompt["input_ids"], prompt["pixel_values"], mask=prompt["mask"], **dict(given)
    ).to_dict()
    embeds = found.pop("inputs_embeds")
    named = given | {key: value for key, value in found.items() if value is not None}
    logits: mx.array = model.language_model(
        prompt["input_ids"], inputs_embeds=embeds, cache=cache, **named
    ).logits
    mx.eval(logits)
    return logits[0]


def decode(model: Any, cache: list[Any], tokens: list[int]) -> mx.array:
    return mx.concatenate(
        [model.language_model(mx.array([[token]]), cache=cache).logits[0] for token in tokens]
    )


def fresh(name: str, seed: int, tokens: list[int]) -> tuple[mx.array, mx.array]:
    """Logits of a prompt with a picture and of tokens after it, by mlx-vlm's own caches."""
    model: Any = build_vlm(name)
    cache = make_theirs(model.language_model)
    return prefill(model, cache, picture(name, seed)), decode(model, cache, tokens)


def assert_equal(ours: mx.array, expected: mx.array) -> None:
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_and_ways_on(name: str) -> None:
    """Two conversations about two pictures in turn, a fork, and going back to before new text."""
    model = model_of(name)
    caches = [make_prompt_cache(model) for _ in range(2)]
    expected = [fresh(name, seed, MORE) for seed in (0, 1)]
    for seed in (0, 1):
        assert_equal(prefill(model, caches[seed], picture(name, seed)), expected[seed][0])
    fork = caches[0].fork()
    for i, token in enumerate(MORE):
        for seed in (0, 1):
            assert_equal(decode(model, caches[seed], [token]), expected[seed][1][i : i + 1])
    assert_equal(decode(model, fork, MORE), expected[0][1])
    caches[1].rewind(4)
    assert_equal(decode(model, caches[1], MORE[2:]), expected[1][1][2:])


@pytest.mark.parametrize("name", NAMES)
def test_two_pictures_in_one_batch(name: str) -> None:
    model = model_of(name)
    rows = [make_prompt_cache(model) for _ in range(2)]
    for seed, cache in enumerate(rows):
        prefill(model, cache, picture(name, seed))
    decode(model, rows[1], MORE[:2])
    batch = [own.merge([own, other]) for own, other in zip(*rows, strict=True)]
    tokens = [MORE[:3], MORE[2:5]]
    found = [
        model.language_model(mx.array([*zip(*tokens, strict=True)][i])[:, None], cache=batch).logits
        for i in range(3)
    ]
    for row, (seed, text) in enumerate(((0, MORE[:3]), (1, MORE[:5]))):
        assert_equal(mx.concatenate([own[row] for own in found]), fresh(name, seed, text)[1][-3:])


def cut_to_one_layer(model: Any) -> Any:
    """In one layer, keys and values depend on their own tokens only, so that a removal is exact."""
    inner = model.language_model.model
    inner.layers = inner.layers[:1]
    return model


@pytest.mark.parametrize("overflow", ["offsets run ahead", "offsets begin again"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_removal_around_a_picture(name: str, overflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text before it, text after it, and the picture itself; never a part of it."""
    if overflow == "offsets begin again":
        monkeypatch.setattr("mlx_kvcache.plugin.pool.conversation.FARTHEST", 3)
    model = cut_to_one_layer(build_vlm(name))
    prompt = picture(name)
    tokens: list[int] = prompt["input_ids"][0].tolist()
    places = [i for i, token in enumerate(tokens) if token == IMAGE]
    begin, end, total = places[0], places[-1] + 1, len(tokens)

    def asked(kept: list[int]) -> mx.array:
        """The logits of what follows these tokens of the prompt."""
        cache = make_theirs(model.language_model)
        for state in ("_rope_deltas", "_position_ids"):
            if hasattr(model.language_model, state):
                setattr(model.language_model, state, None)
        text = mx.array([[tokens[i] for i in kept]])
        if begin in kept:
            prefill(model, cache, prompt | {"input_ids": text})
        else:
            model.language_model(text, cache=cache)
        return decode(model, cache, MORE)

    for gone in ((1, 3), (end + 2, end + 5), (begin, end), (begin - 2, end + 1)):
        cache = make_prompt_cache(model)
        prefill(model, cache, prompt)
        cache.remove(*gone)
        kept = [i for i in range(total) if not gone[0] <= i < gone[1]]
        fork = cache.fork()
        assert_equal(decode(model, cache, MORE), asked(kept))
        fork.remove(0, 1)
        assert_equal(decode(model, fork, MORE), asked(kept[1:]))
    if make_prompt_cache(model).pool.axes:
        with pytest.raises(NotSupportedError, match="is inside a picture"):
            full = make_prompt_cache(model)
            prefill(model, full, prompt)
            full.remove(1, begin + 1)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5", "gemma3", "llava"])
def test_a_saved_picture(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    cache = make_prompt_cache(model)
    prefill(model, cache, picture(name))
    cache.save(tmp_path / "picture")
    loaded = PromptCache.load(tmp_path / "picture", model)
    expected = decode(model, cache, MORE)
    assert_equal(decode(model, loaded, MORE), expected)


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A prompt and another one after it as one."""
    axes = {"input_ids": 1}
    return {
        key: value if value is None else mx.concatenate([value, second[key]], axis=axes.get(key, 0))
        for key, value in first.items()
    }


def test_a_picture_in_the_second_turn() -> None:
    """Its positions go on where the text before it ended."""
    name = "qwen2_vl"
    model: Any = model_of(name)
    first, second = picture(name, 0), picture(name, 1)
    cache = make_prompt_cache(model)
    prefill(model, cache, first)
    ours = prefill(model, cache, second)
    both = joined(first, second)
    expected = prefill(model, make_theirs(model.language_model), both | {"mask": None})
    assert_equal(ours, expected[first["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "mllama", "qwen3_5"])
def test_a_prompt_in_small_blocks(name: str) -> None:
    """As mlx-vlm's `generate_step` divides it, and with the states of cross-attention that it passes on."""
    model: Any = build_vlm(name)
    prompt = picture(name)
    model_lm, cache = model.language_model, make_prompt_cache(model)

    def generated(cache: list[Any]) -> list[int]:
        given = {
            key: value for key, value in prompt.items() if key not in ("input_ids", "pixel_values", "mask")
        }
        steps = generate_step(
            prompt["input_ids"],
            model,
            prompt["pixel_values"],
            prompt["mask"],
            max_tokens=6,
            prefill_step_size=4,
            prompt_cache=cache,
            **given,
        )
        return [int(token) for token, _ in steps]

    assert generated(cache) == generated(make_theirs(model_lm))
    assert cache.position == prompt["input_ids"].shape[1] + 6


def test_a_batch_whose_pictures_cannot_be_divided() -> None:
    """Arrays that are not one for each row or column stop a call that would have to divide them."""
    name = "qwen3_vl"
    model: Any = model_of(name)
    cache = make_prompt_cache(model, capacity=8, overflow="shift")
    with pytest.raises(NotSupportedError, match="call the model for one row or block at a time"):
        prefill(model, cache, picture(name))
    assert cache.position == 0


def test_a_call_that_fails_after_a_picture_leaves_its_positions_out() -> None:
    """Once in the model, and once as the forward ends."""
    name = "qwen2_vl"
    model: Any = build_vlm(name)
    cache = make_prompt_cache(model)
    prefill(model, cache, picture(name, 0))
    expected, before = fresh(name, 0, MORE)[1], cache.position
    rows, own = cache[0].rows, model.language_model.model.norm

    def failing(*args: Any) -> Any:
        raise RuntimeError("stopped")

    model.language_model.model.norm = failing
    with pytest.raises(RuntimeError, match="stopped"):
        prefill(model, cache, picture(name, 1))
    model.language_model.model.norm = own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rows), "finish", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            prefill(model, cache, picture(name, 1))
    assert cache.position == before
    assert_equal(decode(model, cache, MORE), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava"])
def test_prefixes_with_pictures(name: str) -> None:
    """Conversations share what comes before the first picture that differs, and nothing after it."""
    model: Any = build_vlm(name)
    pool = make_session_pool(model)

    def asked(seed: int) -> int:
        prompt = picture(name, seed)
        key, salt = picture_key(model, prompt)
        assert len(key) == prompt["input_ids"].shape[1]
        with pool.open(key, salt) as session:
            reused = session.reused
            if reused:
                rest: list[int] = prompt["input_ids"][0, reused:].tolist()
                assert (IMAGE in rest) == (seed != 0)
                if IMAGE in rest:
                    session.cache.rewind_to(0)
                    prefill(model, session.cache, prompt)
                else:
                    decode(model, session.cache, rest)
            else:
                prefill(model, session.cache, prompt)
            assert_equal(decode(model, session.cache.fork(), MORE), fresh(name, seed, MORE)[1])
            pool.store(key, session.cache.fork(), salt)
        return reused

    tokens: list[int] = picture(name)["input_ids"][0].tolist()
    assert asked(0) == 0
    assert asked(0) == len(tokens) - 1
    assert asked(1) == tokens.index(IMAGE)
    without = {key: value for key, value in picture(name).items() if key != "pixel_values"}
    unknown, _ = picture_key(model, {"input_ids": without["input_ids"]})
    assert unknown == tokens[: tokens.index(IMAGE)]
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        picture_key(model, {"input_ids": mx.zeros((2, 3), mx.int32)})


@pytest.mark.parametrize("sinks", [0, 4, 8])
def test_a_shift_takes_whole_pictures(sinks: int) -> None:
    """The borders of what it removes move to the end of a picture. Its last token is at 11."""
    model = cut_to_one_layer(build_vlm("qwen2_vl"))
    prompt = picture("qwen2_vl")
    tokens: list[int] = prompt["input_ids"][0].tolist()
    end = max(i for i, token in enumerate(tokens) if token == IMAGE) + 1
    cache = make_prompt_cache(model, capacity=len(tokens) + 2, overflow="shift", sinks=sinks)
    prefill(model, cache, prompt)
    text = (MORE * 8)[: 2 * len(tokens)]
    decode(model, cache, text)
    assert cache.gaps and cache.position <= len(tokens) + 2
    deltas = cache._conversation.head.deltas
    # All of the picture is there, behind the sinks that end inside it, or nothing of it.
    assert len(deltas.inside) == (5 if tokens.index(IMAGE) < sinks < end else 0)
    with pytest.raises(CacheFullError, match="sinks end inside a picture"):
        small = make_prompt_cache(model, capacity=len(tokens), overflow="shift", sinks=8)
        prefill(model, small, prompt)
        model.language_model(mx.array([(MORE * 4)[: len(tokens) - 9]]), cache=small)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
@pytest.mark.parametrize("size", [3, 7])
def test_a_picture_in_the_second_turn_in_small_blocks(name: str, size: int) -> None:
    """The positions that mlx-vlm computes for it count from its own beginning."""
    model: Any = build_vlm(name)

    def generated(caches: list[Any], prompts: list[dict[str, Any]], size: int) -> mx.array:
        for prompt in prompts:
            steps = generate_step(
                prompt["input_ids"], model, prompt["pixel_values"], prompt["mask"], prompt_cache=caches,
                max_tokens=2, prefill_step_size=size, image_grid_thw=prompt["image_grid_thw"],
            )  # fmt: skip
            logprobs: mx.array = next(iter(steps))[1]
        return logprobs

    first, second = picture(name, 0), picture(name, 1)
    cache = make_prompt_cache(model)
    prefill(model, cache, first)
    both = joined(first, second)
    expected = generated(make_theirs(model.language_model), [both], 512)
    assert difference(generated(cache, [second], size), expected) <= EXACT * 10
