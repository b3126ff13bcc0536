"""Timing two ways of doing the same work, and saying on what machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
from tqdm import tqdm


@dataclass(frozen=True)
class Paired:
    """Seconds of both, and the median of the ratios of neighbouring runs."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.ratio:.3f} (quartiles {low:.3f} to {high:.3f})"


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int, name: str = "") -> Paired:
    """Run both in turn, `rounds` times after one warm-up; each returns the seconds it took."""
    ours(), theirs()
    first: list[float] = []
    second: list[float] = []
    for index in tqdm(range(rounds), desc=name, leave=False):
        # Whoever goes first may be slowed by what the other left behind, so they take turns.
        for work, seconds in ((ours, first), (theirs, second))[:: 1 if index % 2 else -1]:
            seconds.append(work())
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Paired(statistics.median(first), statistics.median(second), statistics.median(ratios), (low, high))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> str:
    """One line for the head of a result."""
    blas = "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "BLAS of the wheel"
    device = "GPU" if mx.default_device() == mx.Device(mx.gpu) else f"CPU, {blas}"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}, "
        f"Python {platform.python_version()}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    )
