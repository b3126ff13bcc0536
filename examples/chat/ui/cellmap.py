"""Draws what the caches hold: a row of blocks for each chat, with a block for one or more tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.plugin import Holding

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#14b8a6", "#f97316", "#84cc16")
"""The colors of chats, readable on light and dark backgrounds. Nothing else on the screen has them."""
NOBODY = "#8a8f98"

FREE, OWN, SHARED, HIDDEN, MOVED, SINK, DISK = range(7)
SIGNS = "·█▚▁▀◆░"
MEANINGS = {
    OWN: "remembered",
    SHARED: "remembered once, used by several chats or versions",
    MOVED: "moved up when older text was forgotten",
    SINK: "the beginning, always looked at",
    HIDDEN: "too far back: no longer looked at",
    DISK: "on disk, fetched when you open the chat",
}
PLAIN, DIM = 1.0, 0.65


@dataclass(frozen=True)
class Cells:
    """The cells of one segment: the kind and the sequence of each, as NumPy arrays."""

    kinds: Any
    sequences: Any


class Chats(NamedTuple):
    """What is known of the conversations, by their ids.

    Attributes:
        order: their ranks, which determine their colors.
        titles: their titles.
        on_disk: the numbers of tokens that a file holds.
        current: the one on the screen.
    """

    order: Mapping[str, int] = {}
    titles: Mapping[str, str] = {}
    on_disk: Mapping[str, int] = {}
    current: str = ""


class Row(NamedTuple):
    """A conversation's id, and the kinds of its tokens as a NumPy array."""

    chat: str
    kinds: Any


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


def rows_of(seen: Seen, chats: Chats) -> list[Row]:
    """The conversations with tokens in memory or on disk: the current one first, then the newest.

    The tokens of the current branch come first, then those that only other branches have. Of several kinds of
    layers, the one that holds most counts.
    """
    found: dict[str, list[Any]] = {}
    for holding, kinds in _fullest(seen):
        taken: dict[tuple[str, int], Any] = {}
        # What belongs to no known conversation is listed only where no other has it.
        for sequence in sorted(holding.runs, key=lambda s: (s not in seen.owners, s != seen.current)):
            chat = seen.owners.get(sequence, "")
            for span in holding.runs[sequence]:
                cells, part = kinds[span.segment], slice(span.start, span.stop)
                own, all_ = (
                    taken.setdefault((c, span.segment), np.zeros(len(cells), bool)) for c in (chat, "")
                )
                fresh = ~own[part]
                own[part] = all_[part] = True
                found.setdefault(chat, []).append(cells[part][fresh])
    rows = {chat: np.concatenate(parts) for chat, parts in found.items()}
    rows |= {c: np.full(tokens, DISK, np.int8) for c, tokens in chats.on_disk.items() if c not in rows}
    listed = sorted(rows, key=lambda chat: (chat != chats.current, -chats.order.get(chat, -1)))
    return [Row(chat, rows[chat]) for chat in listed if len(rows[chat])]


def drawn(seen: Seen, chats: Chats, width: int, height: int, ground: str) -> Text:
    """Draw all caches in `width` x `height` characters, choosing a scale that fits.

    Args:
        ground: the background color; conversations other than the current one are shaded toward it.
    """
    rows = rows_of(seen, chats)
    used = sorted({int(kind) for row in rows for kind in np.unique(row.kinds)})
    scale = 1
    while _height(rows, scale, width) + len(_legend(used, scale, width)) > height:
        if all(len(row.kinds) <= width * scale for row in rows):
            break
        scale *= 2
    legend = _legend(used, scale, width)
    # A title and a line of blocks are shown in any case.
    left = max(2, height - len(legend))
    text = Text(no_wrap=True)
    for number, row in enumerate(rows):
        needed = _height([row], scale, width)
        if left < needed + (number < len(rows) - 1):
            tokens = sum(len(row.kinds) for row in rows[number:])
            text.append(f"and {len(rows) - number} more: {tokens:,} tokens"[:width] + "\n", "italic")
            left -= 1
            break
        left -= needed
        _draw(text, row, scale, chats, width, ground)
    if count := sum(len(points) for holding in seen.holdings for points in holding.checkpoints.values()):
        text.append(f"{count} save points to go back to"[:width] + "\n", "italic")
    if left > 0:
        text.append("\n")
    text.append("\n".join(legend), "italic")
    return Text("\n", no_wrap=True).join(text.split("\n")[:height])


def _fullest(seen: Seen) -> list[tuple[Holding, dict[int, Any]]]:
    """The kind of layers that holds most tokens, if any, with the kinds of its cells by segment."""
    held = [
        (
            holding,
            dict(zip(holding.segments, (cells.kinds for cells in cells_of(holding, seen)), strict=True)),
        )
        for holding in seen.holdings
        if holding.rule is not None
    ]
    return sorted(held, key=lambda pair: -sum(np.count_nonzero(kinds) for kinds in pair[1].values()))[:1]


def _height(rows: list[Row], scale: int, width: int) -> int:
    """The number of lines that these conversations need."""
    return sum(1 + -(-len(row.kinds) // (width * scale)) for row in rows)


def _blocks(kinds: Any, scale: int) -> list[int]:
    """The kind of each block: of its tokens the rarest, which has the highest number."""
    padded = np.pad(kinds, (0, -len(kinds) % scale))
    blocks: list[int] = padded.reshape(-1, scale).max(axis=1).tolist()
    return blocks


def _draw(text: Text, row: Row, scale: int, chats: Chats, width: int, ground: str) -> None:
    """Draw a conversation: its title and the number of its tokens, and its blocks below."""
    is_current = row.chat == chats.current
    color = _mixed(color_of(row.chat, chats.order), ground, PLAIN if is_current else DIM)
    title = f"{'●' if is_current else '○'} {chats.titles.get(row.chat) or 'other text'}"
    count = f" {len(row.kinds):,}"
    space = max(0, width - len(count))
    title = title if len(title) <= space else title[: max(0, space - 1)] + "…"
    text.append((title.ljust(space) + count)[:width] + "\n", Style(color=color, bold=is_current))
    blocks = _blocks(row.kinds, scale)
    for start in range(0, len(blocks), width):
        line = "".join(SIGNS[kind] for kind in blocks[start : start + width])
        text.append(line + "\n", Style(color=color))


def _mixed(color: str, ground: str, share: float) -> str:
    pairs = zip(_channels(color), _channels(ground), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _legend(used: Iterable[int], scale: int, width: int) -> list[str]:
    """The lines of the legend of the signs in use."""
    block = "Each block is one token" if scale == 1 else f"Each block is {scale:,} tokens"
    lines = textwrap.wrap(f"{block} (a piece of a word) that the model need not read again:", width)
    for kind in used:
        lines += textwrap.wrap(f"{SIGNS[kind]} {MEANINGS[kind]}", width, subsequent_indent="  ")
    return lines


class CellMap(Widget):
    """The widget of the map; redrawn after every report on the caches."""

    def __init__(self) -> None:
        super().__init__(id="cells")
        self._state: tuple[Seen | None, Chats] = (None, Chats())

    def show(self, seen: Seen | None, chats: Chats) -> None:
        if (seen, chats) != self._state:
            self._state = seen, chats
            self.refresh()

    def render(self) -> Text:
        seen, chats = self._state
        if not (self.size.width and self.size.height):
            return Text()
        if seen is None or not rows_of(seen, chats):
            return Text(
                "Nothing yet. What the model reads and writes is kept here, so that it reads nothing twice."
            )
        return drawn(seen, chats, self.size.width, self.size.height, self.background_colors[1].hex6)
