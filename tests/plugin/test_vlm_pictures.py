"""Pictures in a prompt, on whole models of mlx-vlm with small random vision towers.

After every edit the logits equal those that the model computes afresh for the same prompt, with caches of
its own, and of another copy of the model where it keeps something on its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.configurations.vlm import VLM_WHOLE, build_vlm, picture
from tests.plugin.running import difference

NAMES = [name for name in VLM_WHOLE if name != "mllama"]
MORE = [17, 3, 88, 41, 60, 25]
EXACT = 1e-4
"""In units of the logits' standard deviation."""


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


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
