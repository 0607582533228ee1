"""Tables of measured networks and of predictions beside measured runs: `network_tables`, `measured_tables`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from epsim.report.table import new_table


def network_tables(summary: Mapping[str, Any]) -> Group:
    """Return what was measured of a network, and what the simulator makes of it."""
    tables = []
    for pair in summary["pairs"]:
        shaped = "" if summary["shaped"] else ", UNSHAPED"
        table = new_table(
            f"{pair['name']}{shaped} (medians)", "bytes", "one way", "both ways at once", "post send", "post receive"
        )
        for cell in pair["cells"]:
            times = (_us(cell[name]["s"]) for name in ("one_way", "both_ways", "send", "receive"))
            table.add_row(f"{cell['bytes']}", *times)
        tables.append(table)
    fitted = new_table(
        "What the simulator takes", "pair", "goodput", "latency", "frame overhead", "message header", "ack overhead",
        "mean error of one-way times",
    )  # fmt: skip
    for pair in summary["pairs"]:
        fit = pair["fit"]
        fitted.add_row(
            pair["name"],
            _mbit(pair["goodput_bytes_per_s"]),
            _us(fit["latency_s"]),
            f"{100 * fit['frame_overhead']:.1f} %",
            f"{fit['message_header_bytes']:.0f} B",
            f"{100 * fit['ack_overhead']:.1f} %",
            f"{100 * fit['mean_error']:.1f} %",
        )
    ranks = new_table("Of every rank", "figure", "value")
    ranks.add_row("post a send", _us(summary["send_overhead_s"]))
    ranks.add_row("post a receive", _us(summary["post_receive_s"]))
    for mode, seconds in summary["receive_overhead_s"].items():
        ranks.add_row(f"a received message, mode {mode} (the engine run dry)", _us(seconds))
    ranks.add_row("barrier at the end of a step", _us(summary["barrier_s"]))
    background = summary["background_bytes_per_s"]
    ranks.add_row("compute lost to transfers", "none" if background is None else f"1 s per {background / 1e9:.2f} GB")
    if summary["iperf3_bytes_per_s"]:
        ranks.add_row("iperf3, one TCP stream", _mbit(summary["iperf3_bytes_per_s"]))
    return Group(*tables, fitted, ranks)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us"


def _mbit(bytes_per_s: float) -> str:
    return f"{8e-6 * bytes_per_s:.4g} Mbit/s"


def measured_tables(report: Mapping[str, Any], *, with_cells: bool) -> Group:
    """Return errors, errors of gains and, if asked for, every cell."""
    kind = "EMULATED devices" if report["options"]["emulated"] else "real compute"
    dilation = report["options"]["dilation"]
    title = f"{report['scenario']}: {kind}" + (f", dilation {dilation:g}" if dilation != 1 else "")
    if not report["options"]["shaped"]:
        title += ", UNSHAPED network"
    parts: list[Table] = [_error_table(title, report), _gain_table(report)]
    if with_cells:
        parts.append(_cell_table(report["cells"]))
    return Group(*parts)


def _error_table(title: str, report: Mapping[str, Any]) -> Table:
    columns = (
        "cells", "mean error", "largest", "bias", "without the dry run", "launch to launch", "floor of their mean"
    )  # fmt: skip
    table = new_table(title, "", *columns)
    for metric, errors in report["errors"].items():
        if errors is not None:
            noise, floor = errors["noise_percent"], errors["floor_percent"]
            table.add_row(
                _name(metric),
                str(errors["num_cells"]),
                f"{errors['mean_percent']:.2f} %",
                f"{errors['max_percent']:.2f} %",
                f"{errors['bias_percent']:+.2f} %",
                f"{errors['without_dry_run_percent']:.2f} %",
                "-" if noise is None else f"{noise:.2f} %",
                "-" if floor is None else f"{floor:.2f} %",
            )
    return table


def _gain_table(report: Mapping[str, Any]) -> Table:
    table = new_table(
        "Changes from one value of an axis to another", "axis", "of", "changes", "mean error", "largest",
        "beyond 5 %", "of these with the right sign",
    )  # fmt: skip
    for metric, rows in report["gain_errors"].items():
        for row in rows:
            table.add_row(
                row["axis"] or "all",
                _name(metric),
                str(row["num_gains"]),
                f"{row['mean_error_points']:.2f} points",
                f"{row['max_error_points']:.2f} points",
                str(row["num_clear"]),
                str(row["num_right_sign"]),
            )
    return table


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "Every cell", "", "TTFT measured", "predicted", "error", "TPOT measured", "predicted", "error", "repeated"
    )
    for cell in cells:
        row = [cell["label"]]
        for metric in ("ttft_s", "tpot_s"):
            found = cell[metric]
            row += ["-"] * 3 if found is None else [
                f"{1e3 * found['measured']:.4g} ms", f"{1e3 * found['predicted']:.4g} ms",
                f"{found['error_percent']:+.2f} %",
            ]  # fmt: skip
        table.add_row(*row, str(cell["num_repeated"]))
    return table


def _name(metric: str) -> str:
    return metric.removesuffix("_s").upper()


def cell_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a flat row for every cell and metric, in SI units."""
    return [
        {
            "scenario": report["scenario"],
            "emulated": report["options"]["emulated"],
            "dilation": report["options"]["dilation"],
            "cell": cell["label"],
            "metric": metric,
            **cell[metric],
        }
        for cell in report["cells"]
        for metric in ("ttft_s", "tpot_s")
        if cell[metric] is not None
    ]
