"""mlx-lm's own commands, run as users run them, on a model folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import load_prompt_cache

from mlx_kvcache.plugin import __main__
from tests.folders import written

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
PLUGIN = [sys.executable, "-m", "mlx_kvcache.plugin"]


@pytest.fixture
def folder(smollm2_folder: Path) -> Path:
    """SmolLM2 as a model folder."""
    return smollm2_folder


def done(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PLUGIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        input=text,
        check=False,
    )


def run(*arguments: object, text: str | None = None) -> str:
    ended = done(*arguments, text=text)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("generate --capacity 64", "put --capacity before generate"),
        ("generate --capacity=64", "put --capacity before generate"),
        ("chat --kv-bits 8", "put --kv-bits before chat"),
        ("--kv-bits 7 generate", "--kv-bits: must be 8, 6, 5, 4, 3 or 2, or one for keys .* got 7"),
        ("--kv-bits 8-4 generate", "such as 8,4; got 8-4"),
        ("--kv-bits 8,4,2 generate", "got 8,4,2"),
        ("--capacity -1 generate", "--capacity: must be a whole number, 1 or more, got -1"),
        ("--capacity many generate", "--capacity: must be a whole number, 1 or more, got many"),
        ("--rewind -1 generate", "--rewind: must be a whole number, 0 or more, got -1"),
        ("--kv-group-size 48 generate", "--kv-group-size: invalid choice: 48"),
        ("--overflow shift generate", "--overflow shift needs --capacity N"),
        ("--sinks 4 generate", "--sinks needs --overflow shift and --capacity N"),
        ("--capacity 8 --overflow shift --sinks 8 generate", "--sinks must be below --capacity 8, got 8"),
        ("generates", "invalid choice: 'generates'"),
        ("--host mlx_vlm generate", "--host: invalid choice: 'mlx_vlm'"),
        ("--host mlx-vlm cache_prompt", "mlx-vlm has no command cache_prompt; .* generate, chat, server"),
        pytest.param(
            "--host mlx-vlm server --capacity 64",
            "put --capacity before server: .* go to mlx-vlm",
            marks=pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="needs mlx-vlm"),
        ),
    ],
)
def test_options_that_are_wrong(
    arguments: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plugin", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line


def test_options_of_both_commands_belong_where_they_stand() -> None:
    """mlx-lm's `generate` has these, too."""
    tool = importlib.import_module("mlx_lm.generate")
    given = ["--kv-bits", "8", "--prompt", "--capacity", "--kv-group-size=64"]
    assert __main__._misplaced(__main__._parser(), tool, given) == ["--capacity"]


def test_a_full_cache_ends_in_one_line(tiny: Path) -> None:
    generate = ("generate", "--model", tiny, "--prompt", "one two three " * 60, "-m", 4)
    for ended, told in (
        (done("--capacity", 64, *generate), r"at least \d+ tokens and --capacity is 64: raise --capacity "
                                            "or use --overflow shift"),
        (done("--capacity", 64, "chat", "--model", tiny, text="one two three " * 60 + "\nq\n"),
         "--capacity is 64: raise --capacity or use --overflow shift"),
    ):  # fmt: skip
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert re.search(told, ended.stderr.splitlines()[-1]), ended.stderr


def test_a_model_that_cannot_be_attached_ends_in_one_line(tokenizer: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "odd", tokenizer, layers=1, head_dim=24)
    ended = done("--kv-bits", 8, "generate", "--model", folder, "--prompt", "Hello")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "is not a multiple of group_size 64" in ended.stderr.splitlines()[-1]


def test_generate_with_a_bound(tiny: Path) -> None:
    """More tokens than there is room for, on a model that makes its own caches: mlx-lm ignores the bound."""
    printed = run("generate", "--model", tiny, "--prompt", "Count to ninety.", "--max-kv-size", 48, "-m", 30)
    assert "Generation: 30 tokens" in printed


def test_generate_in_fewer_bits(folder: Path, chat_model: tuple[nn.Module, Any]) -> None:
    """By an option of this package's for any command, and by mlx-lm's own from a length on."""
    asked = "My name is Ada. What is my name?"
    question = ("--model", folder, "--prompt", asked, "-m", 6)
    model, tokenizer = chat_model
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)

    def said(*arguments: object) -> str:
        return run(*arguments).splitlines()[1]

    plain = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6)
    assert len(plain) > 10
    assert said("--kv-bits", "8,6", "generate", *question) == plain
    assert said("generate", *question, "--kv-bits", 8, "--quantized-kv-start", 20) == plain


def test_chat_keeps_what_was_said(folder: Path) -> None:
    printed = run(
        "chat", "--model", folder, "--max-tokens", 12,
        text="My name is Ada.\nWhat is my name?\nq\n",
    )  # fmt: skip
    assert "Ada" in printed.split("?")[-1]


def test_a_prompt_cache_file_loads_again(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    run("cache_prompt", "--model", folder, "--prompt", "The sky is blue.", "--prompt-cache-file", file)
    cache = load_prompt_cache(str(file))
    assert {type(layer).__name__ for layer in cache} == {"KVCache"}
    assert cache[0].offset == cache[-1].offset > 10
    said = run("generate", "--prompt-cache-file", file, "--prompt", "Which colour is the sky?", "-m", 12)
    assert "blue" in said


def test_help_names_the_commands() -> None:
    printed = run("--help")
    for command in ("generate", "chat", "server", "cache_prompt"):
        assert command in printed


@contextmanager
def served(folder: Path, *arguments: object) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*PLUGIN, "server", "--model", str(folder), "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def ask(url: str, messages: list[dict[str, str]], **more: object) -> tuple[str, int, int]:
    """The reply, the length of the prompt, and how much of it was found in a cache."""
    body = json.dumps({"messages": messages, "max_tokens": 6, "temperature": 0.0} | more).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
            break
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


def test_the_server_prefills_only_what_is_new(folder: Path, tokenizer: Any) -> None:
    """Two clients of three turns with one system prompt."""
    system = {"role": "system", "content": "You are a helpful assistant who answers in very few words."}
    questions = ["What is two and two?", "And three more?", "Is it odd?"]

    def common(one: list[int], other: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))

    with served(folder) as url:
        _, _, first = ask(url, [system, {"role": "user", "content": "Good morning."}])

        def talk(client: int) -> list[tuple[int, int]]:
            messages, counts, before = [system], [], list[int]()
            for question in questions:
                messages.append({"role": "user", "content": f"{question} I am client {client}."})
                prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                reply, length, cached = ask(url, messages)
                assert length == len(prompt)
                counts.append((cached, common(before, prompt)))
                messages.append({"role": "assistant", "content": reply})
                before = tokenizer.apply_chat_template(messages)
            return counts

        with ThreadPoolExecutor(2) as clients:
            all_counts = list(clients.map(talk, range(2)))
    assert first == 0
    shared = len(tokenizer.apply_chat_template([system]))
    for counts in all_counts:
        assert counts[0][0] >= shared - 1
        for cached, said_before in counts[1:]:
            # The end of a reply was not computed when it was given.
            assert cached >= said_before - 3
