"""What the map and the strip show."""

from __future__ import annotations

from typing import Any

import pytest

from examples.chat.events import Seen
from examples.chat.fullness import Fullness
from examples.chat.tree import Cost
from examples.chat.ui import cellmap, strip
from mlx_kvcache.cells.visibility import Causal, Window
from mlx_kvcache.plugin import Holding
from mlx_kvcache.plugin.pool.inspection import Span

FULL = Holding(
    Causal(), 2, {1: 16, 2: 8}, runs={7: (Span(1, 0, 0, 10),), 8: (Span(1, 0, 0, 6), Span(2, 0, 6, 3))}
)


def seen(
    *holdings: Holding, current: int | None = 7, cached: int = 10, moved: tuple[int, int] = (0, 0)
) -> Seen:
    return Seen(holdings, {7: "a", 8: "b"}, current, cached, None, 0, 0, None, moved, Cost())


def signs(state: Seen) -> list[str]:
    return [
        "".join(cellmap.SIGNS[kind] for kind in cells.kinds)
        for cells in cellmap.cells_of(state.holdings[0], state)
    ]


def test_shared_own_and_free() -> None:
    assert signs(seen(FULL)) == ["▚" * 6 + "█" * 4 + "·" * 6, "███·····"]


def test_moved_when_messages_were_forgotten() -> None:
    assert signs(seen(FULL, moved=(0, 2)))[0] == "▀▀▚▚▚▚████······"


def test_window_and_sinks() -> None:
    window = Holding(Window(4, 2), 2, {1: 16}, runs={7: (Span(1, 0, 0, 10),)})
    # The next token, at 10, sees itself and three before it.
    assert signs(seen(window)) == ["◆◆▁▁▁▁▁███······"]


def test_nothing_is_looked_at() -> None:
    assert signs(seen(FULL, current=None, cached=0))[0].startswith("▚▚")


def test_drawn_fits() -> None:
    big = Holding(Causal(), 30, {1: 100_000}, runs={7: (Span(1, 0, 0, 60_000),)})
    for width, height in ((30, 12), (10, 8), (60, 40)):
        chats = cellmap.Chats({"a": 0, "b": 1, "c": 2}, {"a": "A title that is long"}, {"c": 30_000}, "a")
        lines = cellmap.drawn(seen(big, FULL), chats, width, height, "#000000").plain.splitlines()
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)


def test_conversations_have_colors_of_their_own() -> None:
    chats = cellmap.Chats({"a": 0, "b": 1, "c": 2}, {"a": "One", "b": "Two", "c": "Three"}, {"c": 5}, "a")
    text = cellmap.drawn(seen(FULL), chats, 40, 20, "#000000")
    colors = {str(span.style) for span in text.spans}
    assert cellmap.COLORS[0] in colors
    assert len(colors) >= 4
    lines = text.plain.splitlines()
    # What is shared is in the row of each; what is on disk is shown as such.
    assert lines[:6] == [
        "● One" + "10".rjust(35),
        "▚▚▚▚▚▚████",
        "○ Three" + "5".rjust(33),
        "░░░░░",
        "○ Two" + "9".rjust(35),
        "▚▚▚▚▚▚███",
    ]
    assert "▚ remembered once, used by several chats" in lines
    assert "Each block is one token (a piece of a" in lines


def test_the_scale_is_stated() -> None:
    text = cellmap.drawn(seen(FULL), cellmap.Chats(current="a"), 12, 12, "#000000").plain
    assert "Each block" in text
    big = Holding(Causal(), 30, {1: 100_000}, runs={7: (Span(1, 0, 0, 60_000),)})
    lines = cellmap.drawn(seen(big), cellmap.Chats(), 60, 12, "#000000").plain.splitlines()
    assert "Each block is 128 tokens" in lines[-3]
    assert sum(line.count("█") for line in lines[1:-3]) == -(-60_000 // 128)


def test_recurrent_layers_show_checkpoints() -> None:
    recurrent = Holding(None, 3, checkpoints={7: (4, 8), 8: (4,)})
    text = cellmap.drawn(seen(recurrent), cellmap.Chats(), 40, 12, "#000000").plain
    assert "3 save points to go back to" in text


def test_the_strip_is_in_proportion() -> None:
    def drawn(**options: Any) -> str:
        return strip.drawn(Fullness(40, **options), 40, "#ffffff").plain

    assert drawn(capacity=80) == "█" * 20 + "·" * 20
    assert drawn(seen_from=20, sinks=4) == "█" * 4 + "▁" * 16 + "█" * 20
    assert drawn(gap=10)[10] == "┆"
    assert strip.drawn(Fullness(), 5, "#ffffff").plain == "·····"


@pytest.mark.parametrize(
    ("context", "note"),
    [
        (Fullness(40, 512), "room for 472 more"),
        (Fullness(450, 512), "nearly full: the oldest messages are forgotten soon"),
        (Fullness(791, 200), "too much: the next message forgets the oldest"),
        (Fullness(40, None, 20, 4), "the model looks at 24 of them"),
        (Fullness(40), "no limit"),
    ],
)
def test_what_happens_next_is_told(context: Fullness, note: str) -> None:
    assert context.note == note
