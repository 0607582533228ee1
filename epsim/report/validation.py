"""Tables of `epsim validate published` for people: `validation_tables`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epsim.report.table import new_table

_METRICS = ("ttft", "tpot")


def validation_tables(report: Mapping[str, Any]) -> RenderableType:
    """Return all tables of a report of `epsim.validate.report.published_report`."""
    s11 = report["s11"]
    return Group(
        Text(f"Published: {report['citation']}", style="yellow"),
        _targets(report["targets"]),
        _studies(s11["studies"]),
        _cells("\nTable S11, all rows fitted (* the outlier)", s11["cells"]),
        *(_cells(f"\nTable S11, held out: {study['title']}", study["cells"]) for study in s11["held_out"]),
        _parameters(s11["parameters"]),
        _images(s11["images"]),
        _ratios(report["s10"]),
        _lines(report["s12"]),
    )


def _targets(targets: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("\nTargets", "of", "figure", "at most", "reached", "")
    for entry in targets:
        unit = entry["unit"]
        verdict = "met" if entry["met"] else f"missed by {entry['missed_by']:.2f} {unit}"
        cells = (f"{entry['target']:g} {unit}", f"{entry['figure']:.2f} {unit}", verdict)
        table.add_row(entry["group"], entry["text"], *cells)
    return table


def _studies(studies: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "\nTable S11: mean errors of the simulator | of the naive rule",
        "predicted", "rows fitted", "predicted rows",
        "TTFT", "without outlier", "TPOT", "TTFT speed-up", "TPOT speed-up",
        "| TTFT", "without outlier", "TPOT", "TTFT speed-up", "TPOT speed-up",
    )  # fmt: skip
    for study in studies:
        cells = [
            text
            for key, other in (("errors", "without_outlier"), ("naive", "naive_without_outlier"))
            for text in (
                _percent(study[key]["ttft_percent"]),
                _percent(study[other]["ttft_percent"]),
                _percent(study[key]["tpot_percent"]),
                _points(study[key]["speedup_ttft_points"]),
                _points(study[key]["speedup_tpot_points"]),
            )
        ]
        cells[5] = f"| {cells[5]}"
        table.add_row(study["title"], str(study["num_train"]), str(study["num_test"]), *cells)
    return table


def _cells(title: str, cells: Sequence[Mapping[str, Any]]) -> Table:
    heads = [head for metric in _METRICS for head in (f"{metric.upper()} published", "predicted", "error")]
    table = new_table(title, "data set", "method", "batch", *heads)
    for cell in cells:
        values = [
            text
            for metric in _METRICS
            for text in (
                f"{cell[metric]['published_s']:.3f} s" + (" *" if cell["outlier"] and metric == "ttft" else ""),
                f"{cell[metric]['predicted_s']:.3f} s",
                f"{cell[metric]['error_percent']:+.1f} %",
            )
        ]
        table.add_row(cell["benchmark"], cell["method"], str(cell["batch_size"]), *values)
    return table


def _parameters(parameters: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "\nTable S11: fitted values, all rows",
        "parameter",
        "specification",
        "fitted",
        "95 % interval",
        "undetermined",
        "bounds",
    )
    for entry in parameters:
        words = entry["text"]
        table.add_row(
            entry["name"],
            words["specified"] or "none",
            words["value"],
            f"{words['interval_low']} .. {words['interval_high']}",
            entry["undetermined_because"] or "",
            f"{words['low']} .. {words['high']}",
        )
    return table


def _images(images: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "\nTable S11: all rows fitted with other numbers of images per MMMU request",
        "images", "prompt tokens", "TTFT", "without outlier", "TPOT", "TTFT speed-up", "TPOT speed-up",
    )  # fmt: skip
    for entry in images:
        errors = entry["errors"]
        table.add_row(
            f"{entry['images']}{' (assumed)' if entry['assumed'] else ''}",
            str(entry["prompt_tokens"]),
            _percent(errors["ttft_percent"]),
            _percent(entry["without_outlier"]["ttft_percent"]),
            _percent(errors["tpot_percent"]),
            _points(errors["speedup_ttft_points"]),
            _points(errors["speedup_tpot_points"]),
        )
    return table


def _ratios(s10: Mapping[str, Any]) -> Table:
    title = (
        f"\nTable S10, batch {s10['batch_size']}: published / simulated, % "
        f"(mean error {s10['mean_error_points']:.2f} points, largest {s10['max_error_points']:.2f})"
    )
    table = new_table(title, "benchmark", "method", *s10["columns"])
    for row in s10["rows"]:
        cells = (f"{a:.1f} / {b:.1f}" for a, b in zip(row["published"], row["simulated"], strict=True))
        table.add_row(row["benchmark"], row["method"], *cells)
    return table


def _lines(s12: Mapping[str, Any]) -> Table:
    title = (
        f"\nTable S12: a + b x batch, two constants per row (mean saving {s12['saving_percent']:.1f} %, published "
        f"{s12['published_saving_percent']:.1f} %)"
    )
    table = new_table(title, "method", "a", "b", *(f"batch {size}" for size in s12["batch_sizes"]))
    for row in s12["rows"]:
        errors = (f"{error:+.1f} %" for error in row["error_percent"])
        table.add_row(row["method"], f"{row['a_s']:.3f} s", f"{row['b_s']:.3f} s", *errors)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} pt"
