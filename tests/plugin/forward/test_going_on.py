"""Steps that go on from the last one, and everything that may come between."""

from __future__ import annotations

import random
from typing import NoReturn

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheFullError
from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from mlx_kvcache.plugin.forward import forward
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama

MODEL = tiny_llama()
WINDOWED = tiny_llama()
WINDOWED.make_cache = lambda: [RotatingKVCache(24) for _ in WINDOWED.layers]


@pytest.fixture
def went_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often a step has gone on from the last one."""
    counts: list[bool] = []

    def counted(self: forward.Forward) -> bool:
        counts.append(original(self))
        return counts[-1]

    original = forward.Forward.again
    monkeypatch.setattr(forward.Forward, "again", counted)
    return counts


class Chat:
    """A cache, and the text that it must hold."""

    def __init__(self, cache: PromptCache, text: list[int]) -> None:
        self.cache = cache
        self.text = text

    def feed(self, model: nn.Module, tokens: list[int]) -> None:
        found = logits_of(model, self.cache, tokens)
        self.text = self.text + tokens
        assert self.cache.position == len(self.text)
        expected = logits_of(model, make_theirs(model), self.text)[-1]
        assert difference(found[-1], expected) <= 1e-4


@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes_between(model: nn.Module, seed: int, went_on: list[bool]) -> None:
    rng = random.Random(seed)
    chats = [Chat(make_prompt_cache(model, rewind=16), [])]
    for _ in range(90):
        chat = rng.choice(chats)
        match rng.choice(["feed"] * 8 + ["block", "rewind", "fork", "fail", "trim", "close"]):
            case "feed":
                for _ in range(rng.randrange(1, 6)):
                    chat.feed(model, [rng.randrange(97)])
            case "block":
                size = rng.randrange(2, 9)
                for _ in range(2):
                    chat.feed(model, [rng.randrange(97) for _ in range(size)])
            case "rewind" | "trim" as how:
                back = rng.randrange(min(8, len(chat.text)) + 1)
                if not chat.cache.can_resume(len(chat.text) - back):
                    continue
                if how == "rewind":
                    chat.cache.rewind(back)
                else:
                    assert {layer.trim(back) for layer in chat.cache} == {back}
                chat.text = chat.text[: len(chat.text) - back]
            case "fork":
                chats = [*chats[-3:], Chat(chat.cache.fork(), chat.text)]
            case "fail":
                fail(model, chat.cache)
            case "close" if len(chats) > 1:
                chats.remove(chat)
                chat.cache.close()
    assert sum(went_on) > 5


def fail(model: nn.Module, cache: PromptCache) -> None:
    """A model that throws between two layers."""
    broken, position = model.layers[1].self_attn.o_proj, cache.position

    def throw(x: mx.array) -> NoReturn:
        raise RuntimeError("broken layer")

    model.layers[1].self_attn.o_proj = throw
    try:
        with pytest.raises(RuntimeError, match="broken layer"):
            model(mx.array([[5]]), cache=cache)
    finally:
        model.layers[1].self_attn.o_proj = broken
    assert cache.position == position


def test_the_capacity_is_kept(went_on: list[bool]) -> None:
    cache = make_prompt_cache(MODEL, capacity=12)
    logits_of(MODEL, cache, list(range(12)), 1)
    assert sum(went_on) >= 9
    with pytest.raises(CacheFullError, match=r"1.*0.*12"):
        logits_of(MODEL, cache, [1])
    assert cache.position == 12
    cache.rewind(1)
    logits_of(MODEL, cache, [7])
    assert cache.position == 12


def test_a_shift_in_the_middle(went_on: list[bool]) -> None:
    """Room is made between two steps, and the next goes on behind fewer tokens."""
    cache = make_prompt_cache(MODEL, capacity=16, overflow="shift", sinks=2)
    logits_of(MODEL, cache, [(7 * i) % 97 for i in range(40)], 1)
    assert cache.position <= 16 and sum(went_on) > 20


def test_layers_may_be_told_again_after_a_step(went_on: list[bool]) -> None:
    """A trim of nothing changes nothing, so that the next step goes on; it must be forgotten all the same."""
    cache = make_prompt_cache(MODEL)
    logits_of(MODEL, cache, [1, 2, 3], 1)
    assert cache[0].trim(0) == 0
    logits_of(MODEL, cache, [4])
    assert went_on[-1]
    assert [layer.trim(2) for layer in reversed(cache)] == [2] * len(cache)
    assert cache.position == 2


def test_layers_driven_by_hand(went_on: list[bool]) -> None:
    """The same, where a forward begins with a mask and is over when every layer has written."""
    cache = make_prompt_cache(MODEL)
    for position in range(20):
        kv = mx.full((1, 2, 1, 8), float(position))
        assert cache[0].make_mask(1) is None
        for layer in cache:
            keys, values = layer.update_and_fetch(kv, -kv)
        assert keys[0, 0, :, 0].tolist() == list(range(position + 1))
        assert values[0, 0, :, 0].tolist() == [-p for p in range(position + 1)]
    assert sum(went_on) >= 17


def test_rows_whose_windows_leave_a_prefix_that_they_share(went_on: list[bool]) -> None:
    model, rng = tiny_llama(), random.Random(0)
    model.make_cache = lambda: [RotatingKVCache(290) for _ in model.layers]
    chats = [Chat(make_prompt_cache(model), [])]
    chats[0].feed(model, [rng.randrange(97) for _ in range(280)])
    chats.append(Chat(chats[0].cache.fork(), chats[0].text))
    for chat in chats:
        chat.feed(model, [rng.randrange(97) for _ in range(2)])
    layers = [own[0].merge(own) for own in zip(*(chat.cache for chat in chats), strict=True)]
    texts = [chat.text for chat in chats]
    for _ in range(16):
        texts = [[*text, rng.randrange(97)] for text in texts]
        found = model(mx.array([text[-1:] for text in texts]), cache=layers)
    for row, text in enumerate(texts):
        assert difference(found[row, -1], logits_of(model, make_theirs(model), text)[-1]) <= 1e-4
    assert sum(went_on) > 12
