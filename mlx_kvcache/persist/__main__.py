"""The command line of `mlx_kvcache.persist`: prints the contents of a saved cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import CacheFileError
from .show import FLOAT, GONE, PACKED, shown

EXAMPLE = """\
example:
  python -m mlx_kvcache.persist show chat.safetensors

The exit status is 0 if the file is intact, and 1 if it is corrupt or not a saved cache.
"""


def main() -> int:
    """Print the contents of a file, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_kvcache.persist",
        description="Inspects files of saved caches.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "show",
        help="print the contents of a file",
        description="Prints the contents of a file. Pictures show the sequence from its first token to its "
        f"last: {FLOAT} is stored as floats, {PACKED} is quantized, {GONE} is not stored.",
    )
    show.add_argument("file", type=Path)
    show.add_argument("--quick", action="store_true", help="verify the header only, not the arrays")
    chosen = parser.parse_args()
    try:
        for line in shown(chosen.file, verify=not chosen.quick):
            sys.stdout.write(f"{line}\n")
    except CacheFileError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
