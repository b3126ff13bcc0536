"""Writes the figures in docs/ranks.md, from the model on paper and what was measured, and their picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import ranks
from benchmarks.machine import described
from benchmarks.ranks_here import CONTEXT, FOLDER, MODEL, SIZES

DOCS = Path(__file__).parent
PAGE = DOCS / "ranks.md"
PICTURE = DOCS / "pictures" / "ranks.svg"
BEGIN, END = "<!-- figures: made by `make figures` -->\n", "<!-- end of figures -->\n"
LARGE = ranks.Model(80, 8192, 64, 8, 128, 28672, 128256, weight_bytes=0.5625)
"""80 layers with 8 KV heads, in 4 bits with a scale and a bias of 16 bits for each 64."""
CHIP = ranks.Chip(reads=800e9, flops=25e12, memory=96e9)
LINKS = {
    "20 us, 6 GB/s": ranks.Link(20e-6, 6e9),
    "100 us, 4 GB/s": ranks.Link(100e-6, 4e9),
    "300 us, 1.1 GB/s": ranks.Link(300e-6, 1.1e9),
}
COLUMNS = (
    "machines",
    "",
    "weights on each",
    "K and V of a token on each",
    "tokens that fit",
    "sent per token by each",
    "waiting",
    "a token",
)
WAYS = ("tensor", "pipeline")
AFTER = 8192

mpl.rcParams["svg.hashsalt"] = "mlx_kvcache"


def main() -> None:
    argparse.ArgumentParser(prog="python -m docs.ranks", description=__doc__).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(_figures()) + "\n" + END + rest.partition(END)[2], "utf-8")
    content = BytesIO()
    _drawn().savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    PICTURE.write_bytes(content.getvalue())


def _figures() -> Iterator[str]:
    yield "![tokens per second and tokens held, by machines](pictures/ranks.svg)\n"
    link = LINKS["100 us, 4 GB/s"]
    yield "On paper, with the chip and the second link of the picture, after 8,192 tokens:\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for size in (1, 2, 4, 8):
        for way in WAYS[: 1 if size == 1 else 2]:
            sent = ranks.bytes_sent(LARGE, way, size) / 1e3 if size > 1 else 0
            yield (
                f"| {size} | {way if size > 1 else ''} | {ranks.weight_bytes(LARGE, size) / 1e9:.1f} GB "
                f"| {LARGE.kv_per_token / size / 1e3:.0f} kB | {ranks.tokens_held(LARGE, CHIP, size):,.0f} "
                f"| {sent:,.0f} kB | {1e3 * ranks.waiting(LARGE, way, size, link):.1f} ms "
                f"| {1e3 * ranks.seconds_per_token(LARGE, way, size, CHIP, link, AFTER):.1f} ms |"
            )
    for path in sorted(FOLDER.glob("*.json")):
        yield from _measured(json.loads(path.read_text(encoding="utf-8")))


def _measured(told: dict[str, Any]) -> Iterator[str]:
    found = told["ranks"]
    cores = 2
    yield (
        f"\nMeasured over loopback by `make bench-ranks`: {described(told['machine'])}; "
        f"load average before it {told['load']:.1f}. Each rank has one thread for products.\n"
    )
    yield "| ranks | `all_sum` of 4 kB | of 1 MB | a vote |"
    yield "|---|---|---|---|"
    for size in SIZES[1:]:
        own = found[str(size)]
        numbers = (own[name] for name in ("all_sum", "all_sum of 1 MB", "vote"))
        yield f"| {size} | " + " | ".join(f"{1e3 * number:.2f} ms" for number in numbers) + " |"
    yield (
        f"\nA token after {CONTEXT} in a model of {MODEL.layers} layers, {MODEL.hidden} wide, in float32. "
        "Predicted is the time of one rank, dealt out to the cores that there are, and the times of the "
        "collectives from above:\n"
    )
    yield "| ranks | | predicted | measured | measured / predicted | without comparing |"
    yield "|---|---|---|---|---|---|"
    for size in SIZES:
        for way in WAYS:
            own = found[str(size)]
            guess = _predicted(found, way, size, cores)
            yield (
                f"| {size} | {way} | {1e3 * guess:.1f} ms | {1e3 * own[way]:.1f} ms | {own[way] / guess:.2f} "
                f"| {1e3 * own[f'{way}, nothing compared']:.1f} ms |"
            )


def _predicted(found: dict[str, dict[str, float]], way: str, size: int, cores: int) -> float:
    """Seconds of a token, from those of one rank and of the collectives."""
    alone, own = found["1"][f"{way}, nothing compared"], found[str(size)]
    if size == 1:
        return alone
    outer = MODEL.outer_weights / (MODEL.layers * MODEL.layer_weights + MODEL.outer_weights)
    if way == "tensor":
        # Layers are computed once in all, the head by each rank: on so many cores at a time.
        seconds = alone * ((1 - outer) + size * outer) / min(size, cores)
        return seconds + 2 * MODEL.layers * own["all_sum"] + own["vote"]
    # One rank after the other, then the head by each; handing on is as long as a step of a vote.
    seconds = alone * ((1 - outer) + outer * size / min(size, cores))
    return seconds + 3 * own["vote"]


def _drawn() -> Figure:
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    sizes = [1, 2, 4, 8]
    for (label, link), colour in zip(LINKS.items(), ("#1f5fa8", "#c0392b", "#7f8c8d"), strict=True):
        for way, style in zip(WAYS, ("-", ":"), strict=True):
            speed = [1 / ranks.seconds_per_token(LARGE, way, n, CHIP, link, AFTER) for n in sizes]
            left.plot(sizes, speed, style, color=colour, marker="o", markersize=3, label=f"{way}, {label}")
    left.set_ylabel("tokens per second")
    left.legend(fontsize=6)
    right.plot(sizes, [ranks.tokens_held(LARGE, CHIP, n) / 1e3 for n in sizes], color="#1f5fa8", marker="o")
    right.set_ylabel("thousands of tokens that fit")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.set_xlabel("machines")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    left.set_title("one reader, after 8,192 tokens", fontsize=9)
    right.set_title("beside the weights, in either way", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
