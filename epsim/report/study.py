"""The table of `epsim study` for people: `study_table`."""

from collections.abc import Sequence

from rich.table import Table

from epsim.report.table import new_table


def study_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of cells that are text already, one row per method."""
    table = new_table("\nMeans over seeds ± standard error", *columns)
    for row in rows:
        table.add_row(*row)
    return table
