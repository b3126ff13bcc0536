"""Models whose calls return an object with `.logits`, as those of mlx-vlm do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import generate_many, make_prompt_cache
from tests.plugin.configurations.build import build
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import VOCABULARY, tiny_llama

TEXT = [(5 * i + i * i) % VOCABULARY for i in range(100)]


@dataclass(frozen=True)
class Output:
    """What mlx-vlm's language models return."""

    logits: mx.array
    hidden_states: Any = None


class Wrapper(nn.Module):
    """A model whose call returns something that is made of the logits."""

    def __init__(self, model: nn.Module, wrap: Callable[[mx.array], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.wrap = wrap

    @property
    def layers(self) -> Any:
        return self.model.layers

    def make_cache(self) -> Any:
        return make_entries(self.model)

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        return self.wrap(self.model(inputs, cache=cache))


def make_entries(model: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache as make_theirs

    made: list[Any] = make_theirs(model)
    return made


class Unwrapped:
    """The same model for functions that want arrays."""

    def __init__(self, model: Wrapper) -> None:
        self.model = model

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        found: mx.array = self.model(inputs, cache=cache).logits
        return found


def test_tokens_are_removed_from_the_middle() -> None:
    plain, wrapped = tiny_llama(), Wrapper(tiny_llama(), Output)
    ours, expected = make_prompt_cache(wrapped), make_prompt_cache(plain)
    logits_of(Unwrapped(wrapped), ours, TEXT[:20])  # type: ignore[arg-type]
    logits_of(plain, expected, TEXT[:20])
    for cache in (ours, expected):
        cache.remove(3, 9)
    found = logits_of(Unwrapped(wrapped), ours, TEXT[20:24])  # type: ignore[arg-type]
    assert difference(found, logits_of(plain, expected, TEXT[20:24])) <= 2e-5


def test_a_full_cache_shifts() -> None:
    plain, wrapped = tiny_llama(), Wrapper(tiny_llama(), Output)
    options: dict[str, Any] = {"capacity": 16, "overflow": "shift", "sinks": 2}
    ours, expected = make_prompt_cache(wrapped, **options), make_prompt_cache(plain, **options)
    found = logits_of(Unwrapped(wrapped), ours, TEXT[:40], 4)  # type: ignore[arg-type]
    assert difference(found, logits_of(plain, expected, TEXT[:40], 4)) <= 2e-5


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_batch_of_unequal_rows(name: str) -> None:
    """Together where the model allows that, and in calls of their own, whose outputs are joined."""
    model = Wrapper(tiny_llama() if name == "llama" else build(name), lambda x: Output(x, [x + 1]))
    alone = [make_prompt_cache(model) for _ in range(2)]
    lengths = (5, 2)
    for cache, length in zip(alone, lengths, strict=True):
        model(mx.array([TEXT[:length]]), cache=cache)
    batch = [layer.merge([layer, other]) for layer, other in zip(*alone, strict=True)]
    for layer in batch:
        layer.prepare(lengths=[3, 1], right_padding=[0, 2])
    block = mx.array([TEXT[5:8], [TEXT[2], 0, 0]])
    found = model(block, cache=batch)
    assert isinstance(found, Output)
    for row, (cache, n) in enumerate(zip(alone, (3, 1), strict=True)):
        expected = model(block[row : row + 1, :n], cache=cache)
        assert difference(found.logits[row : row + 1, :n], expected.logits) <= 1e-4
        hidden, own = found.hidden_states[0], expected.hidden_states[0]
        assert difference(hidden[row : row + 1, :n], own) <= 1e-4


def test_many_sequences() -> None:
    prompts = [TEXT[:9], TEXT[20:23], TEXT[40:45]]
    ours, expected = (
        list(generate_many(model, prompts, max_tokens=5))
        for model in (Wrapper(tiny_llama(), Output), tiny_llama())
    )
    assert ours == expected


def test_a_tuple_is_refused() -> None:
    model = Wrapper(tiny_llama(), lambda x: (x, x))
    cache = make_prompt_cache(model)
    model(mx.array([TEXT[:5]]), cache=cache)
    with pytest.raises(NotSupportedError, match=r"test_outputs returned a tuple.*\.logits"):
        cache.remove(1, 2)
    assert cache.position == 5
    with pytest.raises(NotSupportedError, match="returned a tuple"):
        make_prompt_cache(model, capacity=16, overflow="shift")
    with pytest.raises(NotSupportedError, match="returned a tuple"):
        generate_many(model, [TEXT[:3]])


def test_rows_apart_whose_outputs_cannot_be_joined() -> None:
    model = Wrapper(build("mamba"), lambda x: Output(x, "text"))
    first, second = make_prompt_cache(model), make_prompt_cache(model)
    batch = [layer.merge([layer, other]) for layer, other in zip(first, second, strict=True)]
    for layer in batch:
        layer.prepare(lengths=[3, 1], right_padding=[0, 2])
    with pytest.raises(NotSupportedError, match="they contain a str"):
        model(mx.array([TEXT[:3], TEXT[:3]]), cache=batch)
