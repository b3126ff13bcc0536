"""Runs benchmarks: python -m benchmarks --help"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks import (
    agent,
    batches,
    bits,
    chat,
    chunks,
    decode,
    drift,
    edits,
    endless,
    exactness,
    forks,
    generation,
    graph,
    growth,
    host,
    hybrid,
    many,
    masks,
    packed,
    prefill,
    replies,
    results,
    saving,
    sessions,
    splice,
    window,
)
from benchmarks.bounds import BOUNDS
from benchmarks.machine import described, machine
from benchmarks.rows import Curve, Row
from benchmarks.setting import Setting

Benchmark = Callable[[Setting], Iterator[Any]]

BENCHMARKS: dict[str, Benchmark] = {
    "exactness": exactness.run,
    "drift": drift.run,
    "host": host.run,
    "graph": graph.run,
    "growth": growth.run,
    "prefill": prefill.run,
    "decode": decode.run,
    "generation": generation.run,
    "window": window.run,
    "chunks": chunks.run,
    "masks": masks.run,
    "edits": edits.run,
    "hybrid": hybrid.run,
    "forks": forks.run,
    "batches": batches.run,
    "many": many.run,
    "sessions": sessions.run,
    "splice": splice.run,
    "agent": agent.run,
    "packed": packed.run,
    "bits": bits.run,
    "replies": replies.run,
    "saving": saving.run,
}
APART: dict[str, Benchmark] = {"endless": endless.run, "chat": chat.run}
"""Benchmarks that `--all` leaves out: they take too long, or measure an example."""


def main() -> int:
    known = BENCHMARKS | APART
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--all", action="store_true", help=f"every benchmark but {', '.join(APART)}")
    parser.add_argument("--list", action="store_true", help="say what each benchmark measures")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs, for a first look")
    parser.add_argument("--check", action="store_true", help="fail where a ratio misses its bound")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--model", help="tiny, large, smollm2 or a folder, where a benchmark runs a whole model"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="a file for results, or a folder of such")
    chosen = parser.parse_args()
    if chosen.list:
        for name, run in known.items():
            print(f"{name:12} {(run.__doc__ or '').splitlines()[0]}")
        return 0
    names = list(BENCHMARKS) if chosen.all else chosen.names
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"no benchmark {', '.join(unknown) or 'named'}; there are {', '.join(known)}")
    if chosen.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("there is no GPU that this MLX can use")
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    print(described(machine()), flush=True)
    setting, missed = Setting(chosen.model, chosen.quick), 0
    for name in names:
        print(f"\n{name}", flush=True)
        start, found = time.perf_counter(), []
        for row in known[name](setting):
            found.append(row)
            verdict = _verdict(row, chosen.quick)
            missed += verdict.startswith("  MISSED")
            print(f"  {row}{verdict}", flush=True)
        if chosen.json:
            path = results.path_of(chosen.json)
            results.write(path, name, found, time.perf_counter() - start, chosen.quick)
    return int(chosen.check and missed > 0)


def _verdict(row: Row | Curve, is_quick: bool) -> str:
    bound = BOUNDS.get(row.key)
    if bound is None or isinstance(row, Curve) or bound.is_met(row, is_quick):
        return ""
    is_of_blas = bound.is_of_blas and mx.default_device().type == mx.cpu
    return f"  {'of BLAS, below' if is_of_blas else 'MISSED'} {bound.limit_of(is_quick):.3g}"


if __name__ == "__main__":
    sys.exit(main())
