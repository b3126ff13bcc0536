"""mlx-vlm's commands, run as users run them, on a model folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_kvcache.plugin import __main__
from mlx_kvcache.plugin.attach import _all_models, _bind_all
from tests.plugin.serving.clients import Client
from tests.plugin.serving.mlx_vlm_running import watched

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
VLM = [sys.executable, "-m", "mlx_kvcache.plugin", "--host", "mlx-vlm"]


@pytest.fixture
def detached() -> Iterator[None]:
    """Models are attached until the process ends; here until the test does."""
    before = len(_all_models)
    yield
    del _all_models[before:]
    _bind_all()


@pytest.mark.usefixtures("detached")
def test_generate_within_the_capacity_and_beyond(
    vlm_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(prompt: str) -> None:
        command = (
            f"--host mlx-vlm --capacity 64 generate --verbose --max-tokens 4 --model {vlm_folder} --prompt"
        )
        monkeypatch.setattr(sys, "argv", ["plugin", *command.split(), prompt])
        __main__.main()

    with watched() as calls:
        run("Hello")
    assert "Generation: 4 tokens" in capsys.readouterr().out
    assert calls
    with pytest.raises(SystemExit) as ended:
        run("one two three " * 60)
    told = r"at least \d+ tokens and --capacity is 64: raise --capacity or use --overflow shift"
    assert re.search(told, str(ended.value))


def test_options_of_both_commands_belong_where_they_stand() -> None:
    """mlx-vlm's commands have these, too, in several modules of a package."""
    given = ["--kv-bits", "8", "--model", "--capacity", "--kv-group-size=64"]
    for command in ("generate", "server", "chat"):
        tool = importlib.import_module(f"mlx_vlm.{command}")
        assert __main__._misplaced(__main__._parser(), tool, given) == ["--capacity"]


@contextmanager
def serving(vlm_folder: Path, *arguments: object) -> Iterator[Client]:
    """A server in a process of its own."""
    command = [
        *VLM,
        *map(str, arguments),
        "server",
        "--model",
        str(vlm_folder),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        told = next(found for line in process.stderr if (found := re.search(r"running on \S+:(\d+)", line)))
        yield Client(int(told[1]))
    finally:
        process.terminate()
        process.communicate()


def test_the_server(vlm_folder: Path) -> None:
    with serving(vlm_folder, "--capacity", 64) as client:
        assert client.chat("Hello", model=str(vlm_folder)).status == 200
        refused = client.chat("one two three " * 60, model=str(vlm_folder))
    assert refused.status == 400
    assert "capacity of 64" in json.dumps(refused.body)
