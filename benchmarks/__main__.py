"""python -m benchmarks --help"""

from __future__ import annotations

import argparse
import sys

import mlx.core as mx

from benchmarks import (
    batches,
    bits,
    drift,
    exactness,
    forks,
    generation,
    host,
    many,
    packed,
    saving,
    sharing,
    window,
)
from benchmarks.measure import machine

BENCHMARKS = {
    "exactness": exactness.run,
    "drift": drift.run,
    "forks": forks.run,
    "host": host.run,
    "generation": generation.run,
    "window": window.run,
    "batches": batches.run,
    "many": many.run,
    "sharing": sharing.run,
    "bits": bits.run,
    "packed": packed.run,
    "saving": saving.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--list", action="store_true", help="say what each benchmark measures")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="default: %(default)s")
    chosen = parser.parse_args()
    if chosen.list:
        for name, run in BENCHMARKS.items():
            print(f"{name:12} {(run.__doc__ or '').splitlines()[0]}")
        return 0
    names = list(BENCHMARKS) if chosen.all else chosen.names
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        parser.error(f"no benchmark {', '.join(unknown) or 'named'}; there are {', '.join(BENCHMARKS)}")
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    print(machine())
    for name in names:
        print(f"\n{name}")
        for line in BENCHMARKS[name]():
            print(f"  {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
