"""Chat with a model: python -m examples.chat --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from .terminal import Terminal

SYSTEM = "You are a helpful AI assistant."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chat",
        description="A chat that keeps one prompt cache and reads no token twice. Type /help in it.",
    )
    parser.add_argument(
        "--model", help="path or hub name of an mlx-lm model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--system", default=SYSTEM, help="system prompt (default: %(default)r)")
    parser.add_argument(
        "--capacity",
        type=int,
        help="the most tokens in the cache; the oldest turns make room (default: no bound)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--script", type=Path, help="read messages and commands from this file, one per line")
    chosen = parser.parse_args()
    if chosen.capacity is not None and chosen.capacity < 64:
        parser.error(f"--capacity {chosen.capacity} leaves no room to talk; take 64 or more")
    return chosen


def load(name: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if name is None:
        from examples import smollm2

        return smollm2.load()
    import mlx_lm

    model, tokenizer = mlx_lm.load(name)[:2]
    return model, tokenizer


def lines(script: Path | None) -> Iterator[str]:
    """What the user says, from a file, a pipe or the keyboard."""
    if script is None and sys.stdin.isatty():
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    source = script.read_text().splitlines() if script else (line.rstrip("\n") for line in sys.stdin)
    for line in source:
        print(f"> {line}")
        yield line


def main() -> int:
    chosen = arguments()
    console = Console(stderr=True)
    try:
        with console.status(f"Loading {chosen.model or 'SmolLM2-135M-Instruct'} ..."):
            model, tokenizer = load(chosen.model)
    except (FileNotFoundError, ValueError, OSError) as error:
        console.print(f"[red]Cannot load {chosen.model or 'the model'}:[/red] {error}")
        return 1
    terminal = Terminal(
        model, tokenizer, chosen.system, chosen.capacity, chosen.max_tokens, chosen.temperature
    )
    print("Type a message, or /help for commands.")
    for line in lines(chosen.script):
        if not terminal.handle(line):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
