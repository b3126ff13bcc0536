"""What tests share: the CPU, whose results are the same everywhere, and the real model."""

from __future__ import annotations

import fcntl
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache.storage import codec

SHARED = "smollm2"
"""The folder with SmolLM2 in the folder of a run."""

DEVICES = {
    "cpu": "the CPU, whose results are the same everywhere",
    "as-gpu": "the CPU, but every choice that depends on the device is a GPU's",
    "gpu": "a GPU, whose float32 products may be less exact than the tests expect",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "; ".join(f"{name}: {what}" for name, what in DEVICES.items())
    parser.addoption("--device", choices=list(DEVICES), default="cpu", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are imported, many of which compute at once."""
    device = config.getoption("device")
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    if device == "as-gpu":
        codec.is_cpu = lambda: False


# The core is tested where mlx-lm cannot be installed, too: on Python 3.10.
if find_spec("mlx_lm") is None:
    collect_ignore = [
        "test_rope.py", "benchmarks", "chat", "docs", "examples", "fuzz", "plugin", "project",
        "test_api.py",
    ]  # fmt: skip
# The lowest versions, and other versions of mlx-lm, are tested without mlx-vlm.
if find_spec("mlx_vlm") is None:
    collect_ignore_glob = [
        "plugin/test_vlm_*.py", "plugin/serving/test_mlx_vlm_*.py", "plugin/test_attach_hosts.py",
        "plugin/hosts/test_contract.py", "plugin/hosts/test_two_hosts.py",
    ]  # fmt: skip


@pytest.fixture(params=["CPU", "GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every choice that depends on the device is made as on this one; the CPU computes all the same."""
    answer: str = request.param
    monkeypatch.setattr("mlx_kvcache.storage.codec.is_cpu", lambda: answer == "CPU")
    return answer


@pytest.fixture(scope="session")
def chat_model() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from examples import smollm2

    return smollm2.load(mx.float32)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's."""
    from examples import smollm2

    meta: Any
    _, meta = mx.load(str(smollm2.find()), return_metadata=True)
    return smollm2._tokenizer(meta)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a folder. All processes of a run share it, for it takes seconds and half a gigabyte."""
    from examples import smollm2

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder: Path = shared / SHARED
    with (shared / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            smollm2.export(shared / "smollm2.part", mx.float32)
            (shared / "smollm2.part").rename(folder)
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove what pytest would keep for some runs."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(factory.getbasetemp() / SHARED, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a random model of two layers, and SmolLM2's tokenizer."""
    from tests.folders import written

    return written(tmp_path_factory.mktemp("models") / "tiny", tokenizer, layers=2)


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a random text model of mlx-vlm, and SmolLM2's tokenizer."""
    from tests.plugin.serving.mlx_vlm_models import text_folder

    return text_folder(tmp_path_factory.mktemp("models") / "text", tokenizer)


@pytest.fixture(scope="session")
def vlm(vlm_folder: Path) -> tuple[nn.Module, Any]:
    """This model and its processor, a tokenizer."""
    import mlx_vlm

    model, processor = mlx_vlm.load(str(vlm_folder))
    return model, processor
