"""mlx-lm's own commands on this package's caches."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any, NoReturn

from ..errors import CacheError, CacheFullError
from ..quantization import GROUP_SIZES, WIDTHS
from .attach import attach_all

COMMANDS = ("generate", "chat", "server", "cache_prompt")
PROGRAM = "python -m mlx_kvcache.plugin"


class _Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main() -> None:
    """Read this command's options, attach, and leave the rest to mlx-lm."""
    parser = _parser()
    options = vars(parser.parse_args())
    command, arguments = options.pop("command"), options.pop("arguments")
    capacity, sinks, is_shift = options["capacity"], options["sinks"], options["overflow"] == "shift"
    if is_shift and capacity is None:
        parser.error("--overflow shift needs --capacity N")
    if sinks and not is_shift:
        parser.error("--sinks needs --overflow shift and --capacity N")
    if sinks and sinks >= capacity:
        parser.error(f"--sinks must be below --capacity {capacity}, got {sinks}")
    # Imported first, so that names it has bound are replaced.
    tool = importlib.import_module(f"mlx_lm.{command}")
    for name in _misplaced(parser, tool, arguments):
        parser.error(f"put {name} before {command}: what comes behind it is mlx-lm's")
    sys.argv = [f"mlx_lm.{command}", *arguments]
    try:
        attach_all(**options)
        tool.main()
    except CacheFullError as error:
        sys.exit(f"{PROGRAM} {command}: {_told(error, options)}")
    except (CacheError, ValueError, TypeError) as error:
        if not (isinstance(error, CacheError) or _is_refusal(error)):
            raise
        sys.exit(f"{PROGRAM} {command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Runs a command of mlx-lm with mlx_kvcache attached to every model that it loads.",
        epilog="Example: python -m mlx_kvcache.plugin --capacity 4096 --overflow shift --sinks 4 "
        "generate --model PATH --prompt 'Hello'",
    )
    parser.add_argument("--capacity", type=_positive, metavar="N", help="the most tokens that a cache holds")
    parser.add_argument("--overflow", choices=("error", "shift"), default="error", help="beyond it")
    parser.add_argument(
        "--rewind", type=_whole, default=64, metavar="N", help="newest tokens that windows can always drop"
    )
    parser.add_argument(
        "--sinks", type=_whole, default=0, metavar="N", help="first tokens that a shift never removes"
    )
    parser.add_argument(
        "--kv-bits", type=_bits, metavar="N[,M]", help="bits of keys and values, or of keys and of values"
    )
    parser.add_argument(
        "--kv-group-size", type=int, choices=GROUP_SIZES, default=64, help="features that share a scale"
    )
    parser.add_argument(
        "--quantize-after",
        type=_whole,
        default=0,
        metavar="N",
        help="tokens up to which a cache stays in float",
    )
    parser.add_argument("command", choices=COMMANDS, help="mlx-lm's command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --help lists them")
    return parser


def _misplaced(parser: argparse.ArgumentParser, tool: ModuleType, arguments: list[str]) -> list[str]:
    """Options of this command's behind the command, those that mlx-lm's has, too, left out."""
    own, source = parser._option_string_actions.keys() - {"--help"}, inspect.getsource(tool)
    given = (argument.partition("=")[0] for argument in arguments)
    return [name for name in given if name.startswith("--") and name in own and f'"{name}"' not in source]


def _told(error: CacheFullError, options: dict[str, Any]) -> str:
    """The same in the words of this command."""
    needed = error.capacity - error.free + error.needed
    # mlx-lm's bound takes the place of ours.
    bound = "--capacity" if error.capacity == options["capacity"] else "--max-kv-size"
    full = f"there are {needed} tokens or more and {bound} is {error.capacity}: raise {bound}"
    if bound == "--capacity" and options["overflow"] == "error":
        return f"{full} or use --overflow shift"
    return f"{full} ({error.hint})" if error.hint else full


def _is_refusal(error: BaseException) -> bool:
    """Whether this package refused something, such as a model or bits; else the fault is not the user's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return bool(name.partition(".")[0] == __package__.partition(".")[0])


def _whole(text: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a number from {least} on, got {text}")
    return number


def _positive(text: str) -> int:
    return _whole(text, 1)


def _bits(text: str) -> int | tuple[int, ...]:
    """One number for keys and values, or one for each."""
    listed = text.split(",")
    numbers = tuple(int(part) for part in listed if part.isdecimal())
    if len(numbers) != len(listed) or not 1 <= len(numbers) <= 2 or not set(numbers) <= set(WIDTHS):
        *others, last = map(str, WIDTHS)
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(others)} or {last}, or two of these for keys and values, such as 8,4; "
            f"got {text}"
        )
    return numbers if len(numbers) == 2 else numbers[0]


if __name__ == "__main__":
    main()
