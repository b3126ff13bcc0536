"""Draws a map of the caches, with one character for one or more cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.plugin import Holding

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#14b8a6", "#f97316", "#84cc16")
"""The colors of conversations, readable on light and dark backgrounds."""
NOBODY = "#8a8f98"

FREE, OWN, SHARED, HIDDEN, MOVED, SINK = range(6)
SIGNS = "·█▓░▚◆"
NAMES = ("free", "its own", "shared", "out of sight", "re-based", "sink")
PLAIN, DIM, FAINT = 1.0, 0.65, 0.4


@dataclass(frozen=True)
class Cells:
    """The cells of one segment: the kind and the sequence of each, as NumPy arrays."""

    kinds: Any
    sequences: Any


def color_of(name: str, order: Mapping[str, int]) -> str:
    """The color of a conversation, by its rank in `order`."""
    return COLORS[order[name] % len(COLORS)] if name in order else NOBODY


def cells_of(holding: Holding, seen: Seen) -> list[Cells]:
    """Classify the cells of each segment, as the next token of the current sequence sees them."""
    segments = {
        name: Cells(np.full(capacity, FREE, np.int8), np.full(capacity, -1))
        for name, capacity in holding.segments.items()
    }
    for sequence, spans in sorted(holding.runs.items(), key=lambda pair: pair[0] == seen.current):
        for span in spans:
            cells = segments[span.segment]
            part = slice(span.start, span.stop)
            kinds = cells.kinds[part]
            kinds[:] = np.where(kinds == FREE, OWN, SHARED)
            cells.sequences[part] = sequence
    for span in holding.runs.get(seen.current, ()) if seen.current is not None else ():
        positions = np.arange(span.position, span.end)
        kinds = segments[span.segment].kinds[span.start : span.stop]
        kinds[(positions >= seen.moved[0]) & (positions < seen.moved[1])] = MOVED
        if holding.rule is not None:
            sinks = positions < holding.rule.sinks
            kinds[sinks] = SINK
            kinds[(positions < holding.rule.lower(seen.cached)) & ~sinks] = HIDDEN
    return list(segments.values())


def drawn(seen: Seen, order: Mapping[str, int], width: int, height: int, ground: str) -> Text:
    """Draw all caches in `width` x `height` characters, choosing a scale that fits.

    Args:
        order: the ranks of conversations, for their colors.
        ground: the background color; kinds of layers are shaded toward it.
    """
    held = [(holding, cells_of(holding, seen)) for holding in seen.holdings]
    scale = _scale([cells for _, cells in held], width, height)
    text, used = Text(no_wrap=True), set()
    for index, (holding, segments) in enumerate(held):
        text.append(f"{holding.name} × {holding.layers}"[:width], "bold")
        if holding.rule is None:
            count = sum(map(len, holding.checkpoints.values()))
            text.append(f"\n{count} checkpoints in {len(holding.checkpoints)} sequences"[: width + 1])
        shade = PLAIN - 0.3 * (index % 3)
        for row in _rows(segments, scale, width):
            text.append("\n")
            for kind, sequence in row:
                used.add(kind)
                text.append(SIGNS[kind], _style(kind, sequence, seen, order, shade, ground))
        text.append("\n")
    text.append_text(_legend(used, scale, width))
    return text


def _scale(held: list[list[Cells]], width: int, height: int) -> int:
    """Choose the number of cells for each character, a power of two."""
    scale = 1
    while scale < 1 << 20:
        signs = [sum(-(-len(cells.kinds) // scale) for cells in segments) for segments in held]
        rows = sum(-(-n // width) + 1 for n in signs)
        if rows + len(_legend(range(len(SIGNS)), scale, width).plain.splitlines()) <= height:
            break
        scale *= 2
    return scale


def _rows(segments: list[Cells], scale: int, width: int) -> list[list[tuple[int, int]]]:
    """Arrange segments in rows of characters. Returns the kind and the sequence of each character."""
    signs: list[tuple[int, int]] = []
    for cells in segments:
        short = -len(cells.kinds) % scale
        kinds = np.pad(cells.kinds, (0, short)).reshape(-1, scale)
        sequences = np.pad(cells.sequences, (0, short)).reshape(-1, scale)
        # The rarest kind among the cells of a character, which has the highest number, is shown.
        at = np.arange(len(kinds)), kinds.argmax(axis=1)
        signs += zip(kinds[at].tolist(), sequences[at].tolist(), strict=True)
    return [signs[start : start + width] for start in range(0, len(signs), width)]


def _style(
    kind: int, sequence: int, seen: Seen, order: Mapping[str, int], shade: float, ground: str
) -> Style:
    if kind == FREE:
        return Style(color=NOBODY, dim=True)
    owner = seen.owners.get(sequence, "")
    is_current = owner == seen.owners.get(seen.current if seen.current is not None else -1)
    return Style(color=_mixed(color_of(owner, order), ground, shade * (PLAIN if is_current else DIM)))


def _mixed(color: str, ground: str, share: float) -> str:
    pairs = zip(_channels(color), _channels(ground), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _legend(used: Iterable[int], scale: int, width: int) -> Text:
    """Draw the legend of the signs in use."""
    parts = [f"{SIGNS[kind]} {NAMES[kind]}" for kind in sorted(used, reverse=True)]
    parts.append(f"each sign {scale:,} cell{'s' if scale > 1 else ''}")
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 2 > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + part
    return Text("\n".join(line[:width] for line in lines), style="italic", no_wrap=True)


class CellMap(Widget):
    """The widget of the map; redrawn after every report on the caches."""

    def __init__(self) -> None:
        super().__init__(id="cells")
        self._seen: Seen | None = None
        self._order: Mapping[str, int] = {}

    def show(self, seen: Seen, order: Mapping[str, int]) -> None:
        if (seen, order) != (self._seen, self._order):
            self._seen, self._order = seen, order
            self.refresh()

    def render(self) -> Text:
        if not (self.size.width and self.size.height):
            return Text()
        if self._seen is None or not self._seen.holdings:
            return Text(
                "Nothing is cached yet.\nEvery token that the model reads or writes gets a cell here."
            )
        ground = self.background_colors[1].hex6
        return drawn(self._seen, self._order, self.size.width, self.size.height, ground)
