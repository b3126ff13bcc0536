"""python -m mlx_kvcache.persist --help"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import CacheFileError
from .show import FLOAT, GONE, PACKED, shown


def main() -> int:
    """Show a file, and say with the exit status whether it is sound."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_kvcache.persist", description="Looks into files of saved caches."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "show",
        help="print what is in a file",
        description=f"Prints what is in a file. In the pictures, from the first token to the last, "
        f"{FLOAT} is held in float, {PACKED} in fewer bits, {GONE} is not held.",
    )
    show.add_argument("file", type=Path)
    show.add_argument("--quick", action="store_true", help="verify the head only, not all arrays")
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
