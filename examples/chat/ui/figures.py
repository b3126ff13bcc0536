"""Shows statistics: tokens reused and generated, time saved, speed and memory."""

from __future__ import annotations

from rich.table import Table
from textual.widgets import Static

from ..events import Seen
from ..tree import Cost


def table(seen: Seen | None, last: Cost | None) -> Table:
    """Make the table, for the last reply and for all since the start."""
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column()
    rows.add_column(justify="right")
    rows.add_column(justify="right")
    last, totals = last or Cost(), seen.totals if seen else Cost()
    rows.add_row("", "[b]reply[/b]", "[b]all[/b]")
    rows.add_row("reused", f"{last.reused:,}", f"{totals.reused:,}")
    rows.add_row("prefilled", f"{last.prefilled:,}", f"{totals.prefilled:,}")
    rows.add_row("generated", f"{last.generated:,}", f"{totals.generated:,}")
    rows.add_row("forgotten", f"{last.forgotten:,}", f"{totals.forgotten:,}")
    rows.add_row("saved", f"{last.saved:,.1f} s", f"{totals.saved:,.1f} s")
    rows.add_row("tokens/s", f"{last.rate:.1f}", f"{totals.rate:.1f}")
    rows.add_row(
        "MB",
        f"{(seen.nbytes if seen else 0) / 1e6:,.1f}",
        f"max {(seen.most if seen else 0) / 1e6:,.1f}",
    )
    return rows


class Figures(Static):
    """The widget of the table."""

    def __init__(self) -> None:
        super().__init__(table(None, None), id="figures")

    def show(self, seen: Seen | None, last: Cost | None) -> None:
        self.update(table(seen, last))
