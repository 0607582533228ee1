"""The table of `epsim measure device` for people: `profile_tables`, from the plain summary of a profile."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from epsim.report.table import new_table
from epsim.units import format_time


def profile_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Return a row per operation and, below, the least steady cell of all."""
    table = new_table(summary["title"], "operation", "cells", "up to", "median", "repeats", "spread", "worst", "at")
    for row in summary["ops"]:
        fastest, slowest = map(format_time, row["median_s"])
        worst = row["worst"]
        table.add_row(
            row["op"].replace("_", " "),
            str(row["cells"]),
            _place(row["to"]),
            f"{fastest} .. {slowest}",
            str(row["repeats"]),
            f"{row['spread']:.0%}",
            f"{worst['spread']:.0%}",
            _place(worst["at"]),
        )
    for column in (2, 7):
        table.columns[column].justify = "left"
    worst = max(summary["ops"], key=lambda row: row["worst"]["spread"])
    line = f"Least steady: {worst['op'].replace('_', ' ')} at {_place(worst['worst']['at'])}, quartiles "
    line += f"{worst['worst']['spread']:.0%} of the median ({format_time(worst['worst']['median_s'])}) apart"
    return Group(table, Text(line))


def _place(at: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in at.items())
