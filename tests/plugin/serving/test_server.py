"""mlx-lm's server on attached models: a request that cannot be served fails alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from socketserver import _SocketWriter  # type: ignore[attr-defined]
from typing import Any

import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import lfm2, mamba2
from mlx_lm.server import GenerationContext, TimeBudget

from mlx_kvcache import CacheError
from mlx_kvcache.plugin.entries.base import Layer
from mlx_kvcache.plugin.entries.keyvalue import KeyValueLayer
from mlx_kvcache.plugin.forward.batch_rows import Rows
from mlx_kvcache.plugin.pool.pool import Pool
from tests.folders import saved, written
from tests.plugin.serving.clients import Answer, Client, served

LONG = " ".join(f"word {i}" for i in range(80))
SHORT = "one two three"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Another random model with the same tokenizer."""
    return written(tmp_path_factory.mktemp("models") / "other", tokenizer, layers=3)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random model with recurrent layers, and the same tokenizer."""
    arguments = mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=8,
        head_dim=16,
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        state_size=16,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=2,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=False,
        time_step_limit=(0.001, 100.0),
        time_step_rank="auto",
    )
    folder = tmp_path_factory.mktemp("models") / "recurrent"
    return saved(folder, mamba2.Model(arguments), asdict(arguments), tokenizer)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random model with recurrent layers and full attention, and the same tokenizer."""
    arguments = lfm2.ModelArgs(
        model_type="lfm2",
        vocab_size=49152,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=64,
        block_ff_dim=128,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
        rope_theta=10000.0,
    )
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    # transformers asks for a number that mlx-lm does not have.
    configuration = asdict(arguments) | {"intermediate_size": 128}
    return saved(folder, lfm2.Model(arguments), configuration, tokenizer)


def afresh(folder: Path, *prompts: str, **more: object) -> list[str]:
    """What stock mlx-lm replies to each prompt."""
    with served(folder, is_attached=False) as client:
        return [client.complete(prompt, **more).text for prompt in prompts]


def at_once(client: Client, *prompts: str, **more: object) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda prompt: client.complete(prompt, **more), prompts))


def test_a_prompt_beyond_the_capacity_is_refused_with_the_numbers(tiny: Path) -> None:
    [expected] = afresh(tiny, SHORT)
    with served(tiny, capacity=64) as client:
        answers = at_once(client, SHORT, LONG, SHORT)
        assert [answer.status for answer in answers] == [200, 400, 200]
        assert "capacity of 64" in answers[1].body["error"]
        assert [answers[0].text, answers[2].text] == [expected] * 2
        assert client.health() == 200


def test_a_reply_ends_at_the_capacity(tiny: Path, tokenizer: Any) -> None:
    room = 64 - len(tokenizer.encode(SHORT))
    with served(tiny, capacity=64) as client:
        for more in ({}, {"seed": 1}):
            answer = client.complete(SHORT, max_tokens=500, **more)
            assert answer.finish == "length"
            assert answer.body["usage"]["completion_tokens"] == room
            assert client.complete(SHORT).status == 200


def test_long_prompts_and_replies_shift(tiny: Path) -> None:
    with served(tiny, capacity=64, overflow="shift", sinks=4) as client:
        for more in ({}, {"seed": 1}):
            answers = at_once(client, LONG, SHORT, LONG, max_tokens=90, **more)
            assert [answer.status for answer in answers] == [200] * 3
            assert [answer.body["usage"]["completion_tokens"] for answer in answers] == [90] * 3


def test_another_model_and_back(tiny: Path, other: Path) -> None:
    """What was stored for a model serves no model that is loaded later, be it from the same folder."""
    expected = afresh(tiny, SHORT, LONG)
    with served(tiny) as client:
        assert [client.complete(prompt).text for prompt in (SHORT, LONG)] == expected
        assert client.complete(SHORT, model=str(other)).status == 200
        assert client.complete(SHORT, model="no/such").status == 404
        assert client.complete("something new").status == 200
        for _ in range(2):
            # One of them hits what was stored, and one misses.
            answers = at_once(client, SHORT, LONG, "nothing of the kind")
            assert [answer.text for answer in answers[:2]] == expected
            assert client.complete(SHORT, model=str(other)).status == 200
        assert client.health() == 200


def test_an_empty_prompt(tiny: Path) -> None:
    with served(tiny) as client:
        answer = client.complete("")
        assert answer.status == 400
        assert "at least 1 token" in answer.body["error"]
        assert client.complete(SHORT).status == 200


def test_a_model_that_does_not_run_on_these_caches(tiny: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Its heads cannot be divided into groups; the requests for another model go on."""
    odd = written(tmp_path / "odd", tokenizer, layers=2, head_dim=96)
    with served(tiny, kv_bits=8) as client:
        expected = client.complete(SHORT).text
        answer = client.complete(SHORT, model=str(odd))
        assert answer.status == 404
        assert "96" in answer.body["error"]
        assert client.complete(SHORT).text == expected
        assert client.health() == 200


def test_a_recurrent_model_and_a_recurrent_draft(tiny: Path, recurrent: Path) -> None:
    """Speculative decoding replies what plain decoding does."""
    for target, draft in ((recurrent, recurrent), (tiny, recurrent)):
        expected = afresh(target, SHORT, LONG, max_tokens=12)
        with served(target, "--draft-model", draft) as client:
            assert [client.complete(prompt, max_tokens=12).text for prompt in (SHORT, LONG)] == expected


PLANTED = [
    (Rows, "merged"),
    (Rows, "extend"),
    (Rows, "filter"),
    (Rows, "extracted"),
    (Rows, "fork"),
    (Rows, "subset"),
    (Rows, "trim"),
    (Rows, "prepare"),
    (Rows, "finalize"),
    (Rows, "run"),
    (Rows, "resume_point"),
    (Rows, "check_open"),
    (Layer, "size"),
    (KeyValueLayer, "make_mask"),
    (KeyValueLayer, "update_and_fetch"),
    (Pool, "take_turn"),
    (Pool, "plan_forward"),
    (Pool, "copy"),
]


def test_refusals_in_the_generating_thread(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises there, once: clients get a reply or an error, and the next ones get replies."""
    with served(tiny) as client:
        expected = [client.complete(prompt).text for prompt in (SHORT, LONG)]
        reached = 0
        for owner, name in PLANTED:
            with monkeypatch.context() as patch:
                reached += survives(client, expected, owner, name, patch)
    # Not each is called by this server, or in each run.
    assert reached > len(PLANTED) // 2


def survives(client: Client, expected: list[str], owner: type, name: str, patch: pytest.MonkeyPatch) -> bool:
    """Assert that the server replies as before after the method has raised. Returns whether it has."""
    original = getattr(owner, name)
    planted = 0

    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal planted
        if planted == 1:
            planted = 2
            raise CacheError("planted")
        return original(self, *args, **kwargs)

    patch.setattr(owner, name, refusing)
    planted = 1
    # Alike in the beginning and unlike in length, so that a batch merges, forks, pads and filters.
    for answer in at_once(client, SHORT, LONG, f"{SHORT} {name}", f"{LONG} {name} words", max_tokens=9):
        assert answer.status in (200, 400, 500)
        assert answer.status == 200 or "planted" in answer.body["error"]
    is_reached, planted = planted == 2, 2
    assert [client.complete(prompt).text for prompt in (SHORT, LONG)] == expected
    assert client.health() == 200
    return is_reached


def one_step(budget: object) -> Iterator[None]:
    """A `TimeBudget` of one step."""
    return iter((None,))


def cached(answer: Answer) -> int:
    """The number of the prompt's tokens that were reused."""
    return int(answer.body["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_client_that_leaves_while_its_prompt_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try goes on from the blocks that were read."""
    left = threading.Event()
    read, write, stop = BatchGenerator.next, _SocketWriter.write, GenerationContext.stop

    def following(self: Any) -> Any:
        if self._prompt_batch.tokens and len(self._prompt_batch.tokens[0]) >= 32:
            assert left.wait(60)
        return read(self)

    def broken(self: Any, data: Any) -> int:
        if b"keepalive 32/" in bytes(data):
            raise BrokenPipeError("the client has left")
        return int(write(self, data))

    def stopped(self: Any) -> None:
        stop(self)
        left.set()

    monkeypatch.setattr(TimeBudget, "__iter__", one_step)
    with served(tiny, "--prefill-step-size", 16) as client:
        expected = client.complete(LONG + " a").text
        monkeypatch.setattr(BatchGenerator, "next", following)
        monkeypatch.setattr(_SocketWriter, "write", broken)
        monkeypatch.setattr(GenerationContext, "stop", stopped)
        with client.open("/v1/completions", {"prompt": "The " + LONG, "stream": True}) as reply:
            assert b"keepalive 16/" in reply.read()
        assert cached(client.complete("The " + LONG)) == 48
        assert client.complete(LONG + " a").text == expected


def fail(*args: object) -> None:
    raise RuntimeError("planted")


def test_an_error_loses_nothing_that_was_computed(
    tiny: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the blocks of the request that it ends, nor the reply of another."""
    [letter] = tokenizer.encode("e", add_special_tokens=False)
    step = BatchGenerator.next

    def failing(self: Any) -> Any:
        if self._prompt_batch.tokens and len(self._prompt_batch.tokens[0]) >= 48:
            raise RuntimeError("planted")
        return step(self)

    monkeypatch.setattr(TimeBudget, "__iter__", one_step)
    with served(tiny, "--prefill-step-size", 16) as client:
        with monkeypatch.context() as planted:
            planted.setattr(BatchGenerator, "next", failing)
            body = {"prompt": SHORT, "max_tokens": 1000, "stream": True, "logit_bias": {str(letter): 100.0}}
            with client.open("/v1/completions", body) as reply:
                lines = iter(reply.readline, b"")
                assert sum(b'"text": "e"' in line for line in islice(lines, 40)) > 9
                assert client.complete(LONG).status == 500
                assert b"planted" in b"".join(lines)
        assert cached(client.complete(LONG)) == 48
        n = len(tokenizer.encode(SHORT))
        assert cached(client.complete(SHORT + 9 * "e")) == n + 8
        # A request that is answered alone has read its prompt before its sampler fails.
        with monkeypatch.context() as planted:
            planted.setattr("mlx_lm.server._make_sampler", lambda *args: fail)
            answer = client.complete("The " + LONG, seed=1)
            assert (answer.status, answer.body["error"]) == (500, "planted")
        assert cached(client.complete("The " + LONG, seed=1)) == len(tokenizer.encode("The " + LONG)) - 1


def test_a_history_takes_the_tokens_that_were_generated(
    tiny: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A reply of single letters, whose text the tokenizer cuts otherwise, is not read again."""
    [letter] = tokenizer.encode("e", add_special_tokens=False)
    text = "e" * 24
    assert len(tokenizer.encode(text, add_special_tokens=False)) < 24
    messages = [{"role": "system", "content": "Spell."}, {"role": "user", "content": "Now."}]
    with served(tiny) as client, caplog.at_level("INFO"):
        answer = client.converse(messages, max_tokens=24, logit_bias={str(letter): 100.0})
        assert answer.body["choices"][0]["message"]["content"] == text
        n = answer.body["usage"]["prompt_tokens"]
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]
        assert cached(client.converse(messages)) == n + 24
        assert not [line for line in caplog.messages if line.startswith("Reused") and "departs" in line]
        messages[1]["content"] = "Later."
        assert cached(client.converse(messages)) < n
        [line] = [line for line in caplog.messages if line.startswith("Reused") and "departs" in line]
        assert "'Later." in line
        assert "instead of 'Now." in line


def test_clients_that_leave(tiny: Path) -> None:
    with served(tiny) as client:
        expected = client.complete(SHORT).text
        for _ in range(3):
            with client.open("/v1/completions", {"prompt": LONG, "max_tokens": 400, "stream": True}) as reply:
                reply.readline()
        assert client.complete(SHORT).text == expected
        assert client.health() == 200


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_an_agent_reads_only_what_is_new(kind: str, request: pytest.FixtureRequest) -> None:
    """From the third turn on, at most 1.1 times what the prompt has grown by: a reply and a result.

    A random model's replies have other tokens when they are encoded again, so they are read again.
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": "You call tools. " * 12}]
    with served(request.getfixturevalue(kind)) as client:
        before, shares = 0, []
        for turn in range(6):
            messages.append({"role": "user", "content": f"Result {turn}: " + f"value {turn} " * 20})
            answer = client.converse(messages, max_tokens=24)
            usage = answer.body["usage"]
            computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            shares.append(computed / (usage["prompt_tokens"] - before))
            reply = answer.body["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": reply})
            before = usage["prompt_tokens"]
    assert max(shares[2:]) <= 1.1
