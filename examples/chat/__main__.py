"""Starts the chat: python -m examples.chat --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .settings import Settings

SYSTEM = "You are a helpful AI assistant."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chat",
        description="A chat that shows its cache and reads no token twice. In a terminal it is an "
        "application; otherwise, or with --plain, it reads lines.",
    )
    parser.add_argument(
        "--model", help="path or hub name of an mlx-lm model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--system", help=f"system prompt of new conversations (default: {SYSTEM!r})")
    parser.add_argument("--capacity", type=int, help="the most tokens in a cache; the oldest turns make room")
    parser.add_argument("--window", type=int, help="how many tokens a token sees (default: all)")
    parser.add_argument("--bits", type=int, help="of stored keys and values (default: the model's precision)")
    parser.add_argument("--max-tokens", type=int, help="longest answer")
    parser.add_argument("--temperature", type=float, help="of sampling; 0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this probability")
    parser.add_argument("--min-p", type=float, help="sample no token below this share of the likeliest one's")
    parser.add_argument("--repetition-penalty", type=float, help="1 (none, the default) to 2")
    parser.add_argument("--seed", type=int, help="makes sampled replies repeatable")
    parser.add_argument("--data", type=Path, help="folder of saved conversations (default: the user's data)")
    parser.add_argument("--plain", action="store_true", help="lines in, answers out; nothing is saved")
    parser.add_argument("--script", type=Path, help="read messages and commands from a file; implies --plain")
    return parser.parse_args()


def settings(chosen: argparse.Namespace, usual: Settings) -> Settings:
    """Apply command-line options to settings. Raises ValueError for a value out of bounds."""
    named = {each.name: getattr(chosen, each.name, None) for each in fields(Settings)}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return replace(usual, **given)


def lines(script: Path | None) -> Iterator[str]:
    """Read the user's lines from a file, a pipe or the keyboard."""
    if script is None and sys.stdin.isatty():
        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):
                return
    source = script.read_text().splitlines() if script else (line.rstrip("\n") for line in sys.stdin)
    for line in source:
        print(f"> {line}")
        yield line


def plain(chosen: argparse.Namespace) -> int:
    from rich.console import Console

    from .engine import Engine
    from .models import DEFAULT, CannotLoad, load
    from .plain import Plain
    from .watchdog import exit_without_terminal

    # Nothing is saved here, so signals keep their default action: they end the process at once.
    exit_without_terminal()
    console = Console(stderr=True)
    try:
        with console.status(f"Loading {chosen.model or DEFAULT} ..."):
            model, tokenizer = load(chosen.model)
    except CannotLoad as error:
        console.print(str(error), style="red", markup=False)
        return 1
    usual = Settings(capacity=None, max_tokens=256)
    chat = Plain(Engine(model, tokenizer, settings(chosen, usual)), chosen.system or SYSTEM)
    print("Type a message, or /help for commands.")
    for line in lines(chosen.script):
        if not chat.handle(line):
            break
    return 0


def main() -> int:
    chosen = arguments()
    try:
        settings(chosen, Settings())
        if chosen.plain or chosen.script or not (sys.stdin.isatty() and sys.stdout.isatty()):
            return plain(chosen)
        from .ui.app import run

        return run(chosen.data, chosen.model, chosen.system or SYSTEM, lambda usual: settings(chosen, usual))
    except ValueError as error:
        print(f"examples.chat: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
