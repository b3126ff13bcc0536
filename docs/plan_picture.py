"""The picture of plans: what a wrapper asks of its children for a batch that fits, and one that does not."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import mlx.core as mx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mlx_kvcache import Batch, CacheFullError, CausalCache, SlidingWindowCache, WrapperCache
from mlx_kvcache.caches.causal import PositionalCache, StepPlan

ROOM = 16
COLOURS = {"plan": "#a9c7e8", "make": "#1f5fa8", "refuses": "#c25b12"}


class Event(NamedTuple):
    """Something that a child did: its number, what, and what came of it."""

    child: int
    what: str
    text: str


def watched(child: PositionalCache, number: int, seen: list[Event]) -> PositionalCache:
    """The same cache, which notes when it plans and when a change is made."""
    plan_forward = child._plan_forward

    def plan(batch: Batch) -> StepPlan:
        try:
            made = plan_forward(batch)
        except CacheFullError as full:
            seen.append(Event(number, "refuses", f"{full.needed} needed,\n{full.free} free"))
            raise
        seen.append(Event(number, "plan", f"plan: where\n{len(batch)} tokens go"))
        make = made.make

        def watched_make() -> None:
            make()
            seen.append(Event(number, "make", f"make: ends\nat {child.end(0)}"))

        made.make = watched_make  # type: ignore[method-assign]
        return made

    child._plan_forward = plan  # type: ignore[method-assign]
    return child


def events(blocks: list[int]) -> list[list[Event]]:
    """What happens for each of some blocks of tokens."""
    seen: list[Event] = []
    children = watched(SlidingWindowCache(4), 0, seen), watched(CausalCache(), 1, seen)
    cache = WrapperCache(*children)
    cache.init(mx.float32, capacity=ROOM, max_batch=64)
    found = []
    for n in blocks:
        try:
            cache.start_forward(Batch.run(0, cache.end(0), n))
        except CacheFullError:
            assert [child.end(0) for child in children] == [cache.end(0)] * 2
        found.append(list(seen))
        seen.clear()
    return found


def plan() -> Figure:
    """A lane for each child, time from left to right."""
    blocks = [6, 12]
    figure: Figure
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[4, 2.9])
    titles = (
        "a batch of 6: all children plan, then all make",
        f"12 more in room for {ROOM}: nobody does",
    )
    for axis, title, happened in zip(axes, titles, events(blocks), strict=True):
        _lanes(axis, title, happened)
    axes[0].set_yticks([0, 1], ["SlidingWindowCache", "CausalCache"])
    axes[1].set_yticks([])
    figure.tight_layout()
    return figure


def _lanes(axis: Axes, title: str, happened: list[Event]) -> None:
    for time, (child, what, text) in enumerate(happened):
        box = FancyBboxPatch(
            (time + 0.08, child - 0.3), 0.84, 0.6, boxstyle="round,pad=0.02", color=COLOURS[what]
        )
        axis.add_patch(box)
        colour = "black" if what == "plan" else "w"
        axis.text(time + 0.5, child, text, ha="center", va="center", color=colour, fontsize=8)
        if time:
            before = happened[time - 1].child
            axis.annotate("", (time + 0.06, child), (time - 0.06, before), arrowprops={"arrowstyle": "->"})
    axis.set_xlim(0, max(len(happened), 2.9))
    axis.set_ylim(1.6, -0.6)
    axis.set_xticks([])
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axis.axhline(0.5, color="0.85", linewidth=1)
