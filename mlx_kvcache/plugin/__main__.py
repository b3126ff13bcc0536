"""Runs a command of mlx-lm or mlx-vlm on the caches of this package.

`python -m mlx_kvcache.plugin [options] generate|chat|server|cache_prompt ...` attaches the plug-in to every
model that the command loads. Options before the command belong to this package, those after it to the host.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ..errors import CacheError, CacheFullError
from ..quantization import GROUP_SIZES, RECENT, WIDTHS
from .attach import attach_all
from .hosts.layout import HOSTS

PROGRAM = "python -m mlx_kvcache.plugin"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main() -> None:
    """Parses the options of this package, attaches, and runs the command of the host."""
    parser = _parser()
    options = vars(parser.parse_args())
    name, command, arguments = (options.pop(key) for key in ("host", "command", "arguments"))
    host = next(host for host in HOSTS if host.name == name)
    if command not in host.commands:
        parser.error(f"{name} has no command {command}; its commands are {', '.join(host.commands)}")
    if not host.is_installed:
        parser.error(f"{name} is not installed: pip install {name}")
    if options["cache_recompute"] and not options["cache_reuse"]:
        parser.error("--cache-recompute needs --cache-reuse N")
    capacity, sinks, is_shift = options["capacity"], options["sinks"], options["overflow"] == "shift"
    if is_shift and capacity is None:
        parser.error("--overflow shift needs --capacity N")
    if sinks and not is_shift:
        parser.error("--sinks needs --overflow shift and --capacity N")
    if sinks and sinks >= capacity:
        parser.error(f"--sinks must be below --capacity {capacity}, got {sinks}")
    # attach_all replaces names in modules that are already imported, so the command is imported first.
    tool = importlib.import_module(f"{host.package}.{command}")
    for option in _misplaced(parser, tool, arguments):
        parser.error(f"put {option} before {command}: options after the command go to {name}")
    sys.argv = [f"{host.package}.{command}", *arguments]
    try:
        attach_all(host, **options)
        tool.main()
    except CacheFullError as error:
        sys.exit(f"{PROGRAM} {command}: {_full_message(error, options)}")
    except (CacheError, ValueError, TypeError) as error:
        if not (isinstance(error, CacheError) or _is_refusal(error)):
            raise
        sys.exit(f"{PROGRAM} {command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Runs a command of mlx-lm or mlx-vlm on the caches of mlx_kvcache.",
        epilog="Example: python -m mlx_kvcache.plugin --capacity 4096 --overflow shift --sinks 4 "
        "generate --model PATH --prompt 'Hello'",
    )
    add = parser.add_argument
    names = [host.name for host in HOSTS]
    installed = next((host.name for host in HOSTS if host.is_installed), names[0])
    text = f"the library of models and commands (default: {installed}, the first that is installed)"
    add("--host", choices=names, default=installed, help=text)
    text = "maximum number of tokens in a cache (default: unlimited)"
    add("--capacity", type=partial(_whole, least=1), metavar="N", help=text)
    text = "when a cache is full: stop with an error (default), or remove the older half of its tokens"
    add("--overflow", choices=("error", "shift"), default="error", help=text)
    text = "number of newest tokens that windows, chunks and recurrent layers can always drop (default: 64)"
    add("--rewind", type=_whole, default=64, metavar="N", help=text)
    text = "number of first tokens that --overflow shift never removes (default: 0)"
    add("--sinks", type=_whole, default=0, metavar="N", help=text)
    text = "maximum number of older states that recurrent layers keep for a conversation (default: 16)"
    add("--checkpoints", type=_whole, default=16, metavar="N", help=text)
    text = "maximum number of bytes of such states in all caches (default: 1 GiB)"
    add("--checkpoint-bytes", type=_whole, default=1 << 30, metavar="N", help=text)
    text = "quantize keys and values to N bits, or keys to N and values to M (default: not quantized)"
    add("--kv-bits", type=_bits, metavar="N[,M]", help=text)
    text = "number of features that share a quantization scale (default: 64)"
    add("--kv-group-size", type=int, choices=GROUP_SIZES, default=64, help=text)
    text = "number of newest tokens that are read in float if widths are below 8 (default: %(default)s)"
    add("--kv-recent", type=_whole, default=RECENT, metavar="N", help=text)
    text = "start to quantize when a cache holds more than N tokens (default: 0)"
    add("--quantize-after", type=_whole, default=0, metavar="N", help=text)
    text = "servers: if a prompt changes before its end, also reuse later runs of at least N tokens"
    add("--cache-reuse", type=_whole, default=0, metavar="N", help=f"{text} (default: 0, do not)")
    text = "how much of each such run to compute again, from its first token on: 0.0 to 1.0 (default: 0.0)"
    add("--cache-recompute", type=_fraction, default=0.0, metavar="F", help=text)
    commands = list(dict.fromkeys(command for host in HOSTS for command in host.commands))
    add("command", choices=commands, help="command of the host; only mlx-lm has cache_prompt")
    add("arguments", nargs=argparse.REMAINDER, help="arguments of that command; --help lists them")
    return parser


def _misplaced(parser: argparse.ArgumentParser, tool: ModuleType, arguments: list[str]) -> list[str]:
    """Returns the options after the command that only this package has."""
    own, source = parser._option_string_actions.keys() - {"--help"}, _source(tool)
    given = (argument.partition("=")[0] for argument in arguments)
    return [name for name in given if name.startswith("--") and name in own and f'"{name}"' not in source]


def _source(tool: ModuleType) -> str:
    """Returns the source of a command's module, or of all modules of its package."""
    file = Path(inspect.getfile(tool))
    files = sorted(file.parent.glob("*.py")) if hasattr(tool, "__path__") else [file]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def _full_message(error: CacheFullError, options: dict[str, Any]) -> str:
    """Words a CacheFullError in terms of the command's options."""
    needed = error.capacity - error.free + error.needed
    # --max-kv-size of the host replaces --capacity.
    bound = "--capacity" if error.capacity == options["capacity"] else "--max-kv-size"
    full = f"the cache needs room for at least {needed} tokens and {bound} is {error.capacity}: raise {bound}"
    if bound == "--capacity" and options["overflow"] == "error":
        return f"{full} or use --overflow shift"
    return f"{full} ({error.hint})" if error.hint else full


def _is_refusal(error: BaseException) -> bool:
    """Returns whether the error was raised in this package, so that it needs no traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == __package__.partition(".")[0]


def _whole(text: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text}")
    return number


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0.0 and 1.0, got {text}")
    return number


def _bits(text: str) -> int | tuple[int, ...]:
    """Parses one width for keys and values, or one for each."""
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(numbers) > 2 or not set(numbers) <= set(WIDTHS):
        *others, last = map(str, WIDTHS)
        widths = f"{', '.join(others)} or {last}"
        raise argparse.ArgumentTypeError(
            f"must be {widths}, or one for keys and one for values, such as 8,4; got {text}"
        )
    return numbers if len(numbers) == 2 else numbers[0]


if __name__ == "__main__":
    main()
