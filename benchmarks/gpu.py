"""Measures these caches on a GPU in a few minutes: first their logits in 16 bits, then their speed.

Needs mlx, mlx-lm and numpy, and the folder of this repository: python -m benchmarks.gpu --json OUT.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks import (
    batches,
    decode,
    forks,
    generation,
    host,
    hybrid,
    many,
    measure,
    packed,
    prefill,
    results,
    window,
)
from benchmarks.agreement import checks
from benchmarks.bounds import BOUNDS
from benchmarks.machine import described, machine
from benchmarks.rows import Curve, Row
from benchmarks.setting import Setting

TIMES = {
    "decode": decode,
    "batches": batches,
    "generation": generation,
    "prefill": prefill,
    "packed": packed,
    "window": window,
    "host": host,
    "hybrid": hybrid,
    "many": many,
    "forks": forks,
}
"""The benchmarks, the most important ones first."""
FOR_CHECKS = 0.4
"""The share of the time in which checks may begin."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=420, help="begin nothing afterwards, default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="a file for results, or a folder of such")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu", help="default: %(default)s")
    parser.add_argument("--model", default="large", help="as of python -m benchmarks, default: %(default)s")
    parser.add_argument("--only", choices=["checks", "times"], help="default: both")
    parser.add_argument("--quick", action="store_true", help="fewer checks, and times of a tiny model")
    chosen = parser.parse_args()
    if chosen.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("there is no GPU that this MLX can use; --device cpu runs on the CPU")
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
    print(described(machine()), flush=True)
    run = Run(chosen.seconds, results.path_of(chosen.json) if chosen.json else None, chosen.quick)
    if chosen.only != "times":
        run.check(chosen.seconds * (1 if chosen.only else FOR_CHECKS))
    if chosen.only != "checks":
        run.measure("tiny" if chosen.quick else chosen.model)
    print(run.summary(), flush=True)
    return int(bool(run.failed))


class Run:
    """Everything that one run has found, which is written as it is found."""

    def __init__(self, seconds: float, path: Path | None, is_quick: bool) -> None:
        self._start, self._seconds = time.perf_counter(), seconds
        self._path, self._is_quick = path, is_quick
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self.left_out: list[str] = []

    def check(self, seconds: float) -> None:
        """Compare logits, until these seconds have passed."""
        print("\nagreement", flush=True)
        start, found, failed = self._passed(), list[Row | Curve](), dict[str, str]()
        for check in checks(self._is_quick):
            if self._passed() > seconds:
                self.left_out.append(check.work)
                continue
            try:
                found.append(check.row())
                print(f"  {self._passed():5.0f} s  {found[-1]}", flush=True)
            except Exception as error:  # noqa: BLE001
                failed[check.work] = self._told(check.work, error)
        self._write("agreement", found, start, failed)

    def measure(self, model: str) -> None:
        """Measure times, until the time is used up."""
        setting = Setting(model, self._is_quick)
        measure.MOST_SECONDS = self._seconds / 30
        for index, (name, benchmark) in enumerate(TIMES.items()):
            print(f"\n{name}", flush=True)
            start, found, failed = self._passed(), list[Row | Curve](), dict[str, str]()
            share = 2 * (self._seconds - start) / (len(TIMES) - index)
            rows: Iterator[Any] = benchmark.run(setting)
            try:
                # A next row may take twice as long as the one before it.
                while self._passed() < self._seconds and self._passed() - start < share:
                    row = next(rows)
                    found.append(row)
                    print(f"  {self._passed():5.0f} s  {row}", flush=True)
                    self._write(name, found, start, failed)
                self.left_out.append(f"the rest of {name}")
            except StopIteration:
                pass
            except Exception as error:  # noqa: BLE001
                failed[name] = self._told(name, error)
            finally:
                rows.close()  # type: ignore[attr-defined]
            self._write(name, found, start, failed)
            mx.clear_cache()

    def summary(self) -> str:
        """A short table of what was found."""
        lines = [f"\n{'work':68} {'here':>9} {'peer':>9} {'ratio':>7}  bound"]
        for row in self.rows:
            if row.ratio is not None:
                bound = BOUNDS.get(row.key)
                told = "" if bound is None else "met" if bound.is_met(row, self._is_quick) else "MISSED"
                work = f"{row.work}, {row.peer}"
                lines.append(f"{work:68.68} {row.ours:9.4g} {row.theirs:9.4g} {row.ratio:7.3g}  {told}")
        agreed = [row for row in self.rows if row.key.startswith("agreement.")]
        lines.append(
            f"{len(agreed)} checks agree with float32 as mlx-lm's caches do; {len(self.failed)} failures; "
            f"{self._passed():.0f} s"
        )
        lines += [f"FAILED {name}: {text.splitlines()[-1]}" for name, text in self.failed.items()]
        if self.left_out:
            lines.append(f"no time was left for: {'; '.join(self.left_out)}")
        return "\n".join(lines)

    def _passed(self) -> float:
        return time.perf_counter() - self._start

    def _told(self, name: str, error: Exception) -> str:
        text = "".join(traceback.format_exception(error))
        print(f"  {self._passed():5.0f} s  FAILED {name}\n{text}", flush=True)
        return text

    def _write(self, name: str, found: list[Row | Curve], start: float, failed: dict[str, str]) -> None:
        known = {row.key for row in self.rows}
        self.rows += [row for row in found if isinstance(row, Row) and row.key not in known]
        self.failed |= failed
        if self._path:
            results.write(self._path, name, found, self._passed() - start, self._is_quick, failed)


if __name__ == "__main__":
    sys.exit(main())
