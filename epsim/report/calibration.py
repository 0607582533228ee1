"""Tables of `epsim calibrate` for people: `calibration_tables`, from the plain report of a calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epsim.report.table import new_table
from epsim.units import format_time

_NAMES = {"specified": "scenario as it is, nothing fitted", "in sample": "all rows fitted (in sample)"}


def calibration_tables(report: Mapping[str, Any], *, with_cells: bool = False) -> RenderableType:
    """Return the tables of a report of `epsim.calibrate.calibration.report`; with_cells: one of every cell too."""
    fit = report["fit"]
    title = f"{report['num_cells']} measured cells of {report['data']}; {len(report['parameters'])} parameters fitted, "
    title += f"{fit['message']}, {fit['evaluations']} evaluations"
    return Group(
        Text(title, style="bold"),
        Text(report["search"]["text"], style="dim"),
        _parameters(report["parameters"]),
        _schemes(report["schemes"], report["compare"]),
        *([_cells(report)] if with_cells else []),
        *[Text(f"--set '{line}'") for line in report["set"]],
    )


def _parameters(parameters: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "\nParameters", "field", "fitted", "specified", "bounds", "95 % interval", "determined", "bounds because"
    )
    table.columns[-1].justify = table.columns[-2].justify = "left"
    for entry in parameters:
        words = entry["text"]
        table.add_row(
            entry["field"].removeprefix("cluster."),
            words["value"],
            words["specified"] or "-",
            f"{words['low']} .. {words['high']}",
            f"{words['interval_low']} .. {words['interval_high']}",
            "yes" if entry["determined"] else f"UNDETERMINED: {entry['undetermined_because']}",
            entry["reason"],
        )
    return table


def _schemes(schemes: Sequence[Mapping[str, Any]], compare: Mapping[str, Any] | None) -> Table:
    changes = ["TTFT change", "TPOT change"] if compare else []
    columns = ["rows", "TTFT", "bias", "TPOT", "bias", *changes]
    title = "\nMean errors | of a naive rule without any model (log-log interpolation, else a copy)"
    if compare:
        title += f"; changes from {compare['column']}={compare['value']} in points"
    rule = [f"| {columns[1]}", *columns[2:]]
    table = new_table(title, "predicted", *columns, *rule)
    for scheme in schemes:
        beside = _errors(scheme["naive"], bool(compare))
        beside[0] = f"| {beside[0]}"
        name = _NAMES.get(scheme["name"], scheme["name"])
        table.add_row(name, str(scheme["num_test"]), *_errors(scheme["errors"], bool(compare)), *beside)
    return table


def _errors(found: Mapping[str, Any] | None, compared: bool) -> list[str]:
    shares = ("mean_abs_ttft", "bias_ttft", "mean_abs_tpot", "bias_tpot")
    points = ("speedup_ttft_points", "speedup_tpot_points") if compared else ()
    if found is None:
        return ["-"] * (len(shares) + len(points))
    return [
        *(_share(found[name], signed=name.startswith("bias")) for name in shares),
        *("-" if found[name] is None else f"{found[name]:.2f}" for name in points),
    ]


def _share(value: float | None, *, signed: bool) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"


def _cells(report: Mapping[str, Any]) -> Table:
    rows = report["cells"]
    names = [scheme["name"] for scheme in report["schemes"]]
    columns = [name for name in rows[0] if name not in ("metric", "measured_s") and ": " not in name]
    headings = [heading for name in names for heading in (_NAMES.get(name, name), "error")]
    table = new_table("\nCells", *(c.rpartition(".")[2] for c in columns), "metric", "measured", *headings)
    for row in rows:
        predicted = [
            text
            for name in names
            for text in (_time(row[f"{name}: predicted_s"]), _share(row[f"{name}: error_frac"], signed=True))
        ]
        settings = ["" if row[column] is None else str(row[column]) for column in columns]
        table.add_row(*settings, row["metric"].removesuffix("_s").upper(), _time(row["measured_s"]), *predicted)
    return table


def _time(value: float | None) -> str:
    return "-" if value is None else format_time(value)
