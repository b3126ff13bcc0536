"""The picture of a pool in which conversations share what they have in common."""

from __future__ import annotations

import matplotlib.pyplot as plt
import mlx.core as mx
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mlx_kvcache import Batch, CausalCache

NAMES = ("A", "B", "C", "D")
COLOURS = ("#1f5fa8", "#c25b12", "#2f8f4e", "#8a4fa8")
SHARED, UNUSED = "#5b6b7a", "#ececec"


def conversations() -> CausalCache:
    """A conversation of 40 tokens, two forks of it, a fork of a fork, and tokens of their own."""
    cache = CausalCache()
    cache.init(mx.float32, max_sequences=4, capacity=512)

    def feed(sequence: int, n: int) -> None:
        cache.start_forward(Batch.run(sequence, cache.end(sequence), n))

    feed(0, 40)
    cache.copy_prefix(0, 1, 40)
    cache.copy_prefix(0, 2, 28)
    for sequence, n in ((0, 12), (1, 20), (2, 9)):
        feed(sequence, n)
    cache.copy_prefix(1, 3, 52)
    feed(3, 14)
    return cache


def pool() -> Figure:
    """Above: the segments with their cells. Below: each conversation as the runs that it reads."""
    table = conversations()._table
    segments = table.owned()
    widest = max([table.capacity[s] for s in segments] + [table[s].end for s in range(len(NAMES))])
    figure: Figure
    figure, (cells, runs) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True)
    for row, segment in enumerate(segments):
        cells.add_patch(Rectangle((0, row - 0.35), table.capacity[segment], 0.7, color=UNUSED))
        for cell in range(table.capacity[segment]):
            owners = [
                sequence
                for sequence in range(len(NAMES))
                for span in table[sequence].spans
                if span.segment == segment and span.start <= cell < span.stop
            ]
            if owners:
                colour = SHARED if len(owners) > 1 else COLOURS[owners[0]]
                cells.add_patch(Rectangle((cell, row - 0.35), 1, 0.7, color=colour))
    for sequence, colour in enumerate(COLOURS):
        for span in table[sequence].spans:
            corner = span.position, sequence - 0.35
            runs.add_patch(Rectangle(corner, span.length, 0.7, facecolor=colour, edgecolor="w", linewidth=2))
            where = f"segment {segments.index(span.segment) + 1}, cells {span.start} to {span.stop - 1}"
            short = where if span.length > 30 else where.replace("segment ", "s").replace(", cells", ":")
            middle = span.position + span.length / 2
            runs.text(middle, sequence, short, ha="center", va="center", color="w", fontsize=7)
    for axis, labels in ((cells, [f"segment {i + 1}" for i in range(len(segments))]), (runs, NAMES)):
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlim(0, widest)
        axis.spines[["top", "right", "left"]].set_visible(False)
    cells.set_title("what is stored, by cell", fontsize=10, loc="left")
    runs.set_title("what each conversation reads, by position", fontsize=10, loc="left")
    colours = [*zip(COLOURS, NAMES, strict=True), (SHARED, "shared"), (UNUSED, "unused")]
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in colours],
        loc="lower center", ncols=6, frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure
