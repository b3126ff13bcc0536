"""Shows figures: what reuse has saved in the reply on the screen, and times, speed and memory."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual.widgets import Static

from ..events import Seen
from ..tree import Cost, amount

SHORT = 30
"""The number of screen lines below which only the most important figures are shown."""


def table(seen: Seen | None, reply: Cost | None, is_short: bool = False) -> Table:
    """Make the table, for a reply and for all finished ones since the start."""
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    reply, totals = reply or Cost(), seen.totals if seen else Cost()
    if not is_short:
        rows.add_row("", "[b]reply[/b]", "[b]all[/b]")
        rows.add_row("reused", f"{reply.reused:,}", f"{totals.reused:,}")
        rows.add_row("read", f"{reply.prefilled:,}", f"{totals.prefilled:,}")
        rows.add_row("written", f"{reply.generated:,}", f"{totals.generated:,}")
        rows.add_row("forgotten", f"{reply.forgotten:,}", f"{totals.forgotten:,}")
        rows.add_row("saved", f"{amount(reply.saved)} s", f"{amount(totals.saved)} s")
    rows.add_row("first token", f"{amount(reply.first_token)} s", "")
    rows.add_row("tokens/s", amount(reply.rate), amount(totals.rate))
    now, most = (seen.nbytes, seen.most) if seen else (0, 0)
    rows.add_row("memory", f"{amount(now / 1e6)} MB", f"most {amount(most / 1e6)}")
    return rows


class Figures(Static):
    """The widget of the table."""

    def __init__(self) -> None:
        super().__init__(table(None, None), id="figures")

    def show(self, seen: Seen | None, reply: Cost | None) -> None:
        self.update(table(seen, reply, self.app.size.height < SHORT))


class Headline(Static):
    """What reuse has saved, in one line."""

    def __init__(self) -> None:
        super().__init__("", id="headline")

    def show(self, reply: Cost | None) -> None:
        self.update(Text(reply.headline if reply and reply.generated else ""))
