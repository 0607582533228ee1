"""`new_table`: the look of every table in the terminal; `number`: a cell of it, or of a table in Markdown."""

from rich import box
from rich.table import Table


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table: the first column to the left, the others to the right and unwrapped."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
