"""Writes and reads files of results, one for each machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, name
from benchmarks.rows import Curve, Row

FOLDER = Path(__file__).parent / "results"


def path_of(out: Path) -> Path:
    """The path itself, or for a folder the file in it that is named after this machine."""
    return out / f"{name()}.json" if out.is_dir() else out


def write(
    path: Path,
    benchmark: str,
    found: list[Row | Curve],
    seconds: float,
    is_quick: bool,
    failed: Mapping[str, str] | None = None,
) -> None:
    """Write one benchmark's results into a file, replacing its earlier results there.

    Args:
        failed: the tracebacks of what ended with an error, by its name.
    """
    told: dict[str, Any] = {}
    if path.exists():
        told = json.loads(path.read_text(encoding="utf-8"))
    entry = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "quick": is_quick,
        "seconds": round(seconds),
        "rows": [_compact(asdict(row)) for row in found if isinstance(row, Row)],
        **({"failed": dict(failed)} if failed else {}),
        "curves": [asdict(curve) for curve in found if isinstance(curve, Curve)],
    }
    told[benchmark] = entry
    path.write_text(json.dumps(told, indent=1, default=float) + "\n", encoding="utf-8")


def rows_of(told: Mapping[str, Any]) -> dict[str, Row]:
    """Read the rows of all benchmarks in a file, by key."""
    found = {}
    for entry in told.values():
        for row in entry["rows"]:
            fields = dict(row)
            for pair in ("spread", "peak"):
                if pair in fields:
                    fields[pair] = tuple(fields[pair])
            found[row["key"]] = Row(**fields)
    return found


def curves_of(told: Mapping[str, Any]) -> list[Curve]:
    """Read the curves of all benchmarks in a file."""
    return [Curve(**curve) for entry in told.values() for curve in entry["curves"]]


def _compact(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop fields that are None, and round figures to four digits."""
    return {key: _rounded(value) for key, value in fields.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if not isinstance(value, (str, int)) else value
