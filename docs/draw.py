"""Draw what each kind keeps and what is visible, from the caches themselves."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from docs.plan_picture import plan
from docs.pool_picture import pool
from docs.removal_picture import removal
from mlx_kvcache import (
    Batch,
    CausalCache,
    ChunkedAttentionCache,
    EncoderCache,
    RecurrentCache,
    SlidingWindowCache,
)
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.cells.visibility import visible

TOKENS = 24
GONE, KEPT, VISIBLE = range(3)
COLOURS = ["#f3f3f3", "#a9c7e8", "#1f5fa8"]
Panel = tuple[str, np.ndarray]


def by_position(cache: PositionalCache) -> np.ndarray:
    """Row t: what is kept after the token at t, and what that token saw."""
    cache.init(mx.float32, capacity=TOKENS)
    grid = np.full((TOKENS, TOKENS), GONE)
    for t in range(TOKENS):
        cache.start_forward(Batch([t], [0]))
        for span in cache._table[0].spans:
            grid[t, span.position : span.end] = KEPT
        grid[t, [p for p in range(t + 1) if visible(cache._rule, t, p)]] = VISIBLE
    return grid


def encoder() -> np.ndarray:
    """A new input every nine tokens; each token looks at the newest one."""
    cache = EncoderCache()
    cache.init()
    grid = np.full((TOKENS, TOKENS), GONE)
    for t in range(TOKENS):
        cache.start_forward(Batch([t], [0]))
        if t % 9 == 2:
            cache.put(mx.zeros((1, 1, 4, 1)), mx.zeros((1, 1, 4, 1)))
        entry = cache._streams[0].entry
        if entry:
            grid[t, entry.position] = VISIBLE
    return grid


def recurrent() -> np.ndarray:
    """A block of seven tokens, then single ones, a checkpoint every four."""
    cache = RecurrentCache(interval=4, max_checkpoints=4)
    cache.init()
    grid = np.full((TOKENS, TOKENS), GONE)
    for t in range(6, TOKENS):
        begin = cache.end(0)
        cache.start_forward(Batch.run(0, begin, t + 1 - begin))
        cache.put(mx.zeros(1))
        for position in cache._streams[0].states:
            grid[t, position - 1] = KEPT
        grid[t, t] = VISIBLE
    return grid


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    "causal": lambda: [("CausalCache()", by_position(CausalCache()))],
    "window": lambda: [
        ("SlidingWindowCache(6, rewind=1)", by_position(SlidingWindowCache(6, rewind=1))),
        ("SlidingWindowCache(6, rewind=5, sinks=2)", by_position(SlidingWindowCache(6, rewind=5, sinks=2))),
    ],
    "chunk": lambda: [
        ("ChunkedAttentionCache(8, rewind=1)", by_position(ChunkedAttentionCache(8, rewind=1))),
        ("ChunkedAttentionCache(8, rewind=4)", by_position(ChunkedAttentionCache(8, rewind=4))),
    ],
    "encoder": lambda: [("EncoderCache(), inputs at 2, 11 and 20", encoder())],
    "recurrent": lambda: [("RecurrentCache(interval=4, max_checkpoints=4)", recurrent())],
    "wrapper": lambda: [
        ("layer type 0: SlidingWindowCache(6, rewind=3)", by_position(SlidingWindowCache(6, rewind=3))),
        ("layer type 1: CausalCache()", by_position(CausalCache())),
    ],
}


def of_panels(make: Callable[[], list[Panel]]) -> Figure:
    panels = make()
    figure: Figure
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 5.0), squeeze=False)
    for axis, (title, grid) in zip(axes[0], panels, strict=True):
        axis.imshow(grid, cmap=ListedColormap(COLOURS), vmin=GONE, vmax=VISIBLE, interpolation="none")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="position", ylabel="after the token at")
        for along in (axis.xaxis, axis.yaxis):
            along.set_ticks(np.arange(0, TOKENS, 4))
            along.set_ticks(np.arange(0.5, TOKENS - 1), minor=True)
        axis.grid(which="minor", color="w", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
    labels = ["not held", "held", "seen by that token"]
    patches = [Patch(color=colour, label=label) for colour, label in zip(COLOURS, labels, strict=True)]
    figure.legend(handles=patches, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--format", default="svg", choices=["svg", "png"])
    chosen = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "mlx_kvcache"  # the same picture, the same file
    chosen.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {"pool": pool, "plan": plan, "removal": removal}
    figures |= {name: functools.partial(of_panels, panels) for name, panels in PICTURES.items()}
    for name, make in figures.items():
        path = chosen.out / f"{name}.{chosen.format}"
        figure = make()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
