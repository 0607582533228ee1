"""Tables of `epsim validate exchange` for people: `exchange_tables`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epsim.report.table import new_table


def exchange_tables(report: Mapping[str, Any], with_cells: bool) -> RenderableType:
    """Return the tables of a report of `epsim.validate.exchange_report`; with_cells: every row too."""
    cells = report["cells"]
    shown = [
        _cells(study, [cell for cell in cells if cell["study"] == study["key"]])
        for study in report["studies"]
        if with_cells
    ]
    note = f"All {len(cells)} rows: --cells or --json." if not with_cells else "* fitted"
    groups = [_groups(study) for study in report["studies"]]
    return Group(_targets(report["targets"]), _constants(report["studies"]), *groups, *shown, Text(note, style="dim"))


def _targets(targets: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("Targets: mean error of rows that nothing was fitted to", "of", "rows", "at most", "reached", "")
    for entry in targets:
        verdict = "met" if entry["met"] else f"missed by {entry['missed_by_points']:.2f} points"
        figure, limit = f"{entry['figure_percent']:.2f} %", f"{entry['target_percent']:g} %"
        table.add_row(entry["text"], str(entry["num_rows"]), limit, figure, verdict)
    return table


def _constants(studies: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "\nConstants and mean errors, predicted against published",
        "study", "operation", "latency", "share", "rows fitted", "error", "held out", "error", "bias", "worst",
        "without constants", "with notify",
    )  # fmt: skip
    for study in studies:
        for i, kind in enumerate(study["kinds"]):
            held, fitted, notify = kind["held_out"], kind["fitted"], kind["with_notify"]
            table.add_row(
                study["key"] if i == 0 else "",
                kind["kind"],
                f"{kind['latency_us']:.2f} µs",
                f"{kind['share']:.3f} of {kind['share_of']}",
                str(fitted["num_rows"]),
                percent(fitted["mean_percent"]),
                str(held["num_rows"]),
                percent(held["mean_percent"]),
                percent(held["bias_percent"], "+"),
                percent(held["worst_percent"], "+"),
                percent(kind["without_constants"]["mean_percent"]),
                percent(notify["mean_percent"]) if notify else "-",
            )
    return table


def _groups(study: Mapping[str, Any]) -> Table:
    kinds = [kind["kind"] for kind in study["kinds"]]
    table = new_table(f"\n{study['title']}: held-out rows, mean error | bias", "rows", "number", *kinds)
    for group in study["groups"]:
        errors = (group["kinds"][kind] for kind in kinds)
        texts = (f"{percent(e['mean_percent'])} | {percent(e['bias_percent'], '+')}" for e in errors)
        table.add_row(group["group"], str(group["all"]["num_rows"]), *texts)
    return table


def _cells(study: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Table:
    is_nccl = study["key"].startswith("nccl")
    names = ("gpus", "dtype", "message_bytes") if is_nccl else ("gpus", "hidden", "experts", "topk", "tokens", "sms")
    table = new_table(
        f"\n{study['title']}, every row", "operation", *names, "published", "predicted", "error", "mostly"
    )
    for cell in cells:
        values = ("-" if cell[name] is None else str(cell[name]) for name in names)
        mark = " *" if cell["fitted"] else ""
        times = (f"{cell['published_us']:.2f} µs", f"{cell['predicted_us']:.2f} µs")
        table.add_row(cell["kind"], *values, *times, percent(cell["error_percent"], "+") + mark, cell["mostly"])
    return table


def percent(value: float | None, sign: str = "") -> str:
    """Return a percentage with one digit, or a dash for none; sign: "+" to show it always."""
    return "-" if value is None else f"{value:{sign}.1f} %"
