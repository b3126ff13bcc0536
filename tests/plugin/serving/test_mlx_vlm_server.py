"""mlx-vlm's server on attached models: requests at once, its prefix cache, and one that does not fit."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_vlm
import pytest
from mlx_vlm.prompt_utils import apply_chat_template

from mlx_kvcache import CacheError
from mlx_kvcache.plugin.forward.batch_rows import Rows
from mlx_kvcache.plugin.pool.pool import Pool
from tests.plugin.serving.mlx_vlm_clients import VisionClient, served

CAPACITY = 128
SHORT = "one two three"
LONGER = " ".join(f"word {i}" for i in range(20))
TOO_LONG = " ".join(f"word {i}" for i in range(80))


@pytest.fixture(scope="module")
def expected(vlm: tuple[nn.Module, Any]) -> dict[str, str]:
    """What mlx-vlm generates with its own caches."""
    model, processor = vlm
    found = {}
    for text in (SHORT, LONGER):
        prompt = apply_chat_template(processor, model.config, [{"role": "user", "content": text}])
        found[text] = mlx_vlm.generate(model, processor, prompt, max_tokens=6, temperature=0.0).text.strip()
    return found


@pytest.fixture(scope="module")
def client(vlm_folder: Path, expected: dict[str, str]) -> Iterator[VisionClient]:
    with served(vlm_folder, apc=True, capacity=CAPACITY) as client:
        yield client


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of the calls of the model on this package's caches."""
    found: list[int] = []
    original = Rows.run

    def run(self: Rows, *args: Any) -> Any:
        found.append(len(self.conversations))
        return original(self, *args)

    monkeypatch.setattr(Rows, "run", run)
    return found


def reply(answer: Any) -> str:
    text: str = answer.body["choices"][0]["message"]["content"]
    return text


def test_requests_at_once(client: VisionClient, expected: dict[str, str], sizes: list[int]) -> None:
    texts = [SHORT, LONGER, SHORT, LONGER]
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(client.ask, texts))
    assert [reply(answer) for answer in answers] == [expected[text] for text in texts]
    assert sizes


def test_a_stream(client: VisionClient, expected: dict[str, str], sizes: list[int]) -> None:
    assert client.stream(LONGER).strip() == expected[LONGER]
    assert sizes


def test_a_prompt_beyond_the_capacity_is_refused_with_the_numbers(
    client: VisionClient, expected: dict[str, str]
) -> None:
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(client.ask, [SHORT, TOO_LONG, LONGER]))
    assert [answer.status for answer in answers] == [200, 400, 200]
    assert f"capacity of {CAPACITY}" in answers[1].body["detail"]
    assert [reply(answers[0]), reply(answers[2])] == [expected[SHORT], expected[LONGER]]
    assert client.health() == 200


def test_a_stream_beyond_the_capacity_does_not_begin(client: VisionClient) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.stream(TOO_LONG)
    assert caught.value.code == 400
    assert f"capacity of {CAPACITY}" in caught.value.read().decode()
    assert client.health() == 200


def test_a_reply_ends_at_the_capacity(client: VisionClient) -> None:
    answer = client.ask(SHORT, max_tokens=500)
    assert answer.finish == "length"
    assert answer.body["usage"]["total_tokens"] == CAPACITY


def test_the_next_turn_reads_only_what_is_new(client: VisionClient) -> None:
    messages = [{"role": "user", "content": f"A question about {LONGER}"}]
    before = client.statistics()
    first = client.converse(messages, model=client.model)
    messages += [{"role": "assistant", "content": reply(first)}, {"role": "user", "content": SHORT}]
    second = client.converse(messages, model=client.model)
    after = client.statistics()
    read = first.body["usage"]["prompt_tokens"]
    assert after["matched_tokens"] - before["matched_tokens"] >= read
    assert second.body["usage"]["prompt_tokens_details"]["cached_tokens"] >= read


PLANTED = [(Rows, "merged"), (Rows, "filter"), (Rows, "extracted"), (Pool, "plan_forward")]


@pytest.mark.parametrize(("owner", "name"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_refusals_in_the_generating_thread(
    client: VisionClient,
    expected: dict[str, str],
    owner: type,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever raises there, once: clients get a reply or an error, and the next ones get replies."""
    original, planted = getattr(owner, name), ["once"]

    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if planted:
            planted.pop()
            raise CacheError("planted")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, refusing)
    with ThreadPoolExecutor(4) as clients:
        for answer in clients.map(client.ask, [SHORT, LONGER, f"{SHORT} four", f"{name} {LONGER}"]):
            assert answer.status in (200, 500)
            assert answer.status == 200 or "planted" in answer.body["detail"]
    planted.clear()
    assert [reply(client.ask(text)) for text in (SHORT, LONGER)] == [expected[SHORT], expected[LONGER]]
    assert client.health() == 200
