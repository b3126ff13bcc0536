"""Writes the table of bits and losses into docs/formats.md, and draws them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib as mpl
import mlx.core as mx
from matplotlib.figure import Figure

from benchmarks.bits import BLOCK, TOKENS, Measured, measured
from benchmarks.measure import machine

PAGE = Path(__file__).parent / "formats.md"
PICTURE = Path(__file__).parent / "pictures" / "bits.svg"
BEGIN, END = "<!-- bits: made by `make formats` -->\n", "<!-- end of bits -->\n"
LARGEST = 12
"""Per cent of loss that the picture shows; more is named at its edge."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="draw the page's table, and measure nothing")
    mx.set_default_device(mx.cpu)
    if parser.parse_args().redraw:
        rows = _read(PAGE.read_text(encoding="utf-8"))
    else:
        rows = list(measured())
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + _table(rows) + END + after, encoding="utf-8")
    mpl.rcParams["svg.hashsalt"] = "mlx_kvcache"
    _picture(rows).savefig(PICTURE, metadata={"Date": None})
    return 0


def _read(page: str) -> list[Measured]:
    """The rows of a page's table."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    found = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    return [Measured(name, float(share), float(loss)) for name, share, loss in found]


def _table(rows: list[Measured]) -> str:
    lines = [
        f"SmolLM2-135M-Instruct on the first {TOKENS:,} tokens of `pydoc_data.topics`, in blocks of {BLOCK}; "
        f"{machine()}.\n\n",
        "| bits of keys and values | bytes, of float16's | loss | more than in float |\n|---|---|---|---|\n",
    ]
    lines += [
        f"| {row.name} | {row.share:.3f} | {row.loss:.4f} | {_more(row, rows[0]):+.2f}% |\n" for row in rows
    ]
    return "".join(lines)


def _more(row: Measured, whole: Measured) -> float:
    return 100 * (row.loss / whole.loss - 1)


def _picture(rows: list[Measured]) -> Figure:
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    whole, *packed = rows
    axis.axhline(0, color="0.7", linewidth=1)
    for row in packed:
        more = _more(row, whole)
        is_off = more > LARGEST
        alike = " and " not in row.name
        axis.scatter(
            row.share, min(more, LARGEST), color="C0" if alike else "C1", marker="^" if is_off else "o"
        )
        text = f"{row.name} ({more:+.0f}%)" if is_off else row.name
        axis.annotate(
            text,
            (row.share, min(more, LARGEST)),
            xytext=(-5 if alike else 5, -11 if "," in row.name else 3),
            textcoords="offset points",
            ha="right" if alike else "left",
            fontsize=8,
        )
    axis.set_ylim(-1)
    axis.set_xlabel("bytes of keys and values, of those in float16")
    axis.set_ylabel("more loss than in float, %")
    axis.set_title("blue: as many bits for values as for keys; orange: keys and values", fontsize=9)
    axis.set_xlim(0.05, 0.65)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
