"""What the map and the strip show."""

from __future__ import annotations

from examples.chat.events import Seen
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
    return Seen(holdings, {7: "a", 8: "b"}, current, cached, None, 0, 0, moved, Cost())


def signs(state: Seen) -> list[str]:
    return [
        "".join(cellmap.SIGNS[kind] for kind in cells.kinds)
        for cells in cellmap.cells_of(state.holdings[0], state)
    ]


def test_shared_own_and_free() -> None:
    assert signs(seen(FULL)) == ["▓" * 6 + "█" * 4 + "·" * 6, "███·····"]


def test_moved_when_messages_were_forgotten() -> None:
    assert signs(seen(FULL, moved=(0, 2)))[0] == "▚▚▓▓▓▓████······"


def test_window_and_sinks() -> None:
    window = Holding(Window(4, 2), 2, {1: 16}, runs={7: (Span(1, 0, 0, 10),)})
    # The next token, at 10, sees itself and three before it.
    assert signs(seen(window)) == ["◆◆░░░░░███······"]


def test_nothing_is_looked_at() -> None:
    assert signs(seen(FULL, current=None, cached=0))[0].startswith("▓▓")


def test_drawn_fits() -> None:
    big = Holding(Causal(), 30, {1: 100_000}, runs={7: (Span(1, 0, 0, 60_000),)})
    for width, height in ((30, 12), (10, 8), (60, 40)):
        lines = cellmap.drawn(seen(big, FULL), {"a": 0, "b": 1}, width, height, "#000000").plain.splitlines()
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)


def test_conversations_have_colors_of_their_own() -> None:
    text = cellmap.drawn(seen(FULL), {"a": 0, "b": 1}, 30, 12, "#000000")
    colors = {str(span.style) for span in text.spans}
    assert cellmap.COLORS[0] in colors
    assert len(colors) >= 4


def test_recurrent_layers_show_checkpoints() -> None:
    recurrent = Holding(None, 3, checkpoints={7: (4, 8), 8: (4,)})
    text = cellmap.drawn(seen(recurrent), {}, 40, 12, "#000000").plain
    assert "recurrent × 3" in text
    assert "3 checkpoints in 2 sequences" in text


def test_the_strip_is_in_proportion() -> None:
    parts = [strip.Part("system", 10), strip.Part("user", 20), strip.Part("assistant", 10)]
    assert strip.drawn(parts, 80, 0, 0, False, 40).plain == "█" * 20 + "·" * 20
    assert strip.drawn(parts, None, 20, 4, False, 40).plain == "█" * 4 + "░" * 16 + "█" * 20
    assert strip.drawn(parts, None, 0, 0, True, 40).plain[10] == "┆"
    assert strip.drawn([strip.Part("system", 0)], None, 0, 0, False, 5).plain == "·····"
