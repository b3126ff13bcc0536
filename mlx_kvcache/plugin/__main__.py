"""mlx-lm's own commands on this package's caches."""

from __future__ import annotations

import argparse
import importlib
import sys

from .attach import attach_all

COMMANDS = ("generate", "chat", "server", "cache_prompt")


def main() -> None:
    """Read this command's options, attach, and leave the rest to mlx-lm."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_kvcache.plugin",
        description="Runs a command of mlx-lm with mlx_kvcache attached to every model that it loads.",
        epilog="Example: python -m mlx_kvcache.plugin --capacity 4096 --overflow shift --sinks 4 "
        "generate --model PATH --prompt 'Hello'",
    )
    parser.add_argument("--capacity", type=int, help="the most tokens that a cache holds")
    parser.add_argument("--overflow", choices=("error", "shift"), default="error", help="beyond it")
    parser.add_argument("--rewind", type=int, default=64, help="newest tokens that windows can always drop")
    parser.add_argument("--sinks", type=int, default=0, help="first tokens that a shift never removes")
    parser.add_argument(
        "--kv-bits", type=_bits, metavar="N[,M]", help="bits of keys and values, or of keys and of values"
    )
    parser.add_argument("--kv-group-size", type=int, default=64, help="features that share a scale")
    parser.add_argument(
        "--quantise-after", type=int, default=0, help="tokens up to which a cache stays in float"
    )
    parser.add_argument("command", choices=COMMANDS, help="mlx-lm's command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --help lists them")
    options = vars(parser.parse_args())
    command, arguments = options.pop("command"), options.pop("arguments")
    # Imported first, so that names it has bound are replaced.
    tool = importlib.import_module(f"mlx_lm.{command}")
    attach_all(**options)
    sys.argv = [f"mlx_lm.{command}", *arguments]
    tool.main()


def _bits(text: str) -> int | tuple[int, ...]:
    """One number for keys and values, or one for each."""
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) > 2:
        raise ValueError(f"{len(numbers)} numbers of bits")
    return numbers if len(numbers) == 2 else numbers[0]


if __name__ == "__main__":
    main()
