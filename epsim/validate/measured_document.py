"""The page about measured runs, from the plain values of their reports: `write_measured_document`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsim.atomic import write_all
from epsim.report.figure import figure_style, png
from epsim.report.table import number
from epsim.validate.markdown import table
from epsim.validate.measured import METRICS

_HEAD = """# Validation: measured runs

Real expert-parallel runs on a real (shaped) network, beside predictions made from separate micro-benchmarks alone: of
the network (`epsim measure network`) and, where devices compute, of the device (`epsim measure device`). Nothing is
fitted to the runs. One figure, what a received message takes, is solved for in a **dry run** of the engine itself on
the same network (one token on every rank, every part a pause), one for each mode; *without the dry run* is the mean
error with the time of posting a receive in its place.

`epsim validate measured --docs docs/measured-runs.md` wrote this page and its figure from the measurements that ship
with epsim; edit nothing here by hand. How it is measured, and how to measure your own: [measure.md](measure.md).

- **Measured** is the mean over launches (all processes started afresh) of each launch's median over runs.
- **Noise** is how far one launch is from the mean of the others of its cell; the **floor** is what is left of it in the
  mean of the launches, and so the error that a prediction without any fault would have.
- A **change** compares two cells that differ in one setting, in percent of the first; its error is in points. Its sign
  counts where the measured change is beyond 5 %.
- **Emulated** devices are waits as long as the scenario's device would take: the network, its messages and the programs
  of the ranks are real, the kernels are not. **Dilated** by k: devices and links are k times slower, so that what this
  machine itself adds to every message weighs k times less. **Real** runs compute every product of the model.
"""


# Mean errors at most, %: TTFT, TPOT; of changes of TTFT, points. By emulated, dilated, more than two ranks.
_TARGETS = {(True, True, False): (1, 3, 2), (True, False, False): (2, 5, 2), (True, True, True): (3, 8, 2)}
_REAL_TARGETS = (5, None, 5)  # TPOT: beside the noise
_RIGHT_SIGN_PERCENT = 97


def write_measured_document(path: Path, reports: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the page and its figure, images/measured-runs.png beside it; return the paths."""
    contents = {path.parent / "images" / "measured-runs.png": _figure(reports), path: document(reports).encode()}
    write_all(contents)
    return list(contents)


def document(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the whole text."""
    parts = [_HEAD, targets(reports), summary(reports), "![Predicted against measured times](images/measured-runs.png)"]
    for report in reports:
        parts += section(report)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def targets(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return what was aimed at and what is reached, for each folder."""
    rows = []
    for report in reports:
        options = report["options"]
        kind = (options["emulated"], options["dilation"] != 1, len(report["networks"][0]["fits"]) > 1)
        aims = _TARGETS.get(kind, _REAL_TARGETS) if options["emulated"] else _REAL_TARGETS
        gains = _all_gains(report, "ttft_s")
        figures = [("mean error of " + _name(m), report["errors"][m]["mean_percent"], "%") for m in METRICS]
        figures.append(("mean error of changes of TTFT", gains["mean_error_points"] if gains else None, "points"))
        rows += [(title(report), *_target(*figure, aim)) for figure, aim in zip(figures, aims, strict=True)]
        for metric in METRICS:
            found = _all_gains(report, metric)
            if found and found["num_clear"]:
                share = 100 * found["num_right_sign"] / found["num_clear"]
                met = "met" if share >= _RIGHT_SIGN_PERCENT else f"missed by {_RIGHT_SIGN_PERCENT - share:.1f} %"
                what = f"right sign of changes of {_name(metric)} beyond 5 %"
                rows.append((title(report), what, f"at least {_RIGHT_SIGN_PERCENT} %", f"{share:.1f} %", met))
    return "## Targets and what is reached\n\n" + table(("runs", "figure", "target", "reached", ""), rows)


def _all_gains(report: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """Return the errors of the changes along all axes together; None if there is none."""
    rows = report["gain_errors"][metric]
    return rows[-1] if rows else None


def _target(what: str, figure: float | None, unit: str, aim: float | None) -> tuple[str, str, str, str]:
    if figure is None:
        return what, "-", "-", "-"
    if aim is None:
        return what, "beside the noise", f"{figure:.2f} {unit}", ""
    met = "met" if figure <= aim else f"missed by {figure - aim:.2f} {unit}"
    return what, f"at most {aim:g} {unit}", f"{figure:.2f} {unit}", met


def summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return a row of errors for each folder and metric."""
    rows = []
    for report in reports:
        for metric in METRICS:
            errors, all_gains = report["errors"][metric], _all_gains(report, metric)
            if errors is None:
                continue
            rows.append(
                (
                    title(report),
                    _name(metric),
                    str(errors["num_cells"]),
                    f"{errors['mean_percent']:.2f} %",
                    f"{errors['max_percent']:.2f} %",
                    f"{errors['bias_percent']:+.2f} %",
                    f"{errors['without_dry_run_percent']:.2f} %",
                    number(errors["noise_percent"], 2) + " %",
                    number(errors["floor_percent"], 2) + " %",
                    "-" if all_gains is None else f"{all_gains['mean_error_points']:.2f} points",
                    "-" if all_gains is None else f"{all_gains['num_right_sign']} of {all_gains['num_clear']}",
                )
            )
    columns = (
        "runs",
        "",
        "cells",
        "mean error",
        "largest",
        "bias",
        "without the dry run",
        "noise",
        "floor",
        "error of changes",
        "right sign",
    )
    return "## Errors\n\n" + table(columns, rows)


def title(report: Mapping[str, Any]) -> str:
    """Return what kind of runs a folder holds."""
    options = report["options"]
    kind = "emulated" if options["emulated"] else "real"
    dilation = f", dilated by {options['dilation']:g}" if options["dilation"] != 1 else ""
    shaped = "" if options["shaped"] else ", UNSHAPED"
    return f"{report['scenario']}: {kind}{dilation}{shaped}"


def section(report: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of one folder."""
    machine, options = report["machine"], report["options"]
    said = (
        f"{report['num_launches']} launches of {options['num_runs']} runs, on {machine['date']}: {machine['cpu']}, "
        f"{machine['num_cpus']} cores, {machine['system']}, torch {machine['torch']}, epsim {machine['epsim']}; "
        f"{sum(cell['num_repeated'] for cell in report['cells'])} runs were disturbed by other work and repeated, "
        f"{sum(cell['num_disturbed'] for cell in report['cells'])} kept although they were."
    )
    ratio = report["experts_ratio"]
    source = "the scenario's device" if options["emulated"] else "the profile"
    said += (
        f" Experts took {number(ratio['prefill'], 2)} times as long in prefill, and {number(ratio['decode'], 2)} times "
        f"in decode, as {source} has them."
    )
    parts = [f"## {title(report)}", said, _networks(report), "### Changes", _gains(report), "### Every cell"]
    return [*parts, _cells(report)]


def _networks(report: Mapping[str, Any]) -> str:
    """Return what the micro-benchmarks said, a row for each network and pair of ranks."""
    rows = []
    for entry in report["networks"]:
        for fit in entry["fits"]:
            background = entry["background_bytes_per_s"]
            rows.append(
                (
                    f"{8e-6 * fit['bytes_per_s']:.4g} Mbit/s",
                    f"{1e6 * fit['latency_s']:.0f} us",
                    f"{100 * fit['frame_overhead']:.2f} %",
                    f"{fit['message_header_bytes']:.0f} B",
                    f"{100 * fit['ack_overhead']:.1f} %",
                    f"{1e6 * entry['send_overhead_s']:.0f} us",
                    f"{1e6 * entry['post_receive_s']:.0f} us",
                    " / ".join(f"{1e6 * entry['receive_overhead_s'][mode]:.0f}" for mode in ("sync", "async")) + " us",
                    "-" if background is None else f"{background / 1e9:.2f} GB/s",
                    f"{1e6 * entry['barrier_s']:.0f} us",
                    f"{100 * fit['mean_error']:.1f} %",
                )
            )
    columns = (
        "narrowest link", "latency", "framing", "header", "ACKs", "post a send", "post a receive",
        "a received message, dry run, sync / async", "background", "barrier", "mean error of one-way times",
    )  # fmt: skip
    return "What the micro-benchmarks said:\n\n" + table(columns, rows)


def _gains(report: Mapping[str, Any]) -> str:
    rows = [
        (
            row["axis"] or "all",
            _name(metric),
            str(row["num_gains"]),
            f"{row['mean_error_points']:.2f}",
            f"{row['max_error_points']:.2f}",
            f"{row['num_right_sign']} of {row['num_clear']}",
        )
        for metric in METRICS
        for row in report["gain_errors"][metric]
    ]
    return table(("axis", "of", "changes", "mean error, points", "largest", "right sign beyond 5 %"), rows)


def _cells(report: Mapping[str, Any]) -> str:
    rows = []
    for cell in report["cells"]:
        row = [cell["label"]]
        for metric in METRICS:
            found = cell[metric]
            if found is None:
                row += ["-"] * 3
                continue
            span = f"{1e3 * found['measured']:.4g} ({1e3 * found['low']:.4g}-{1e3 * found['high']:.4g})"
            row += [span, f"{1e3 * found['predicted']:.4g}", f"{found['error_percent']:+.1f} %"]
        rows.append(row)
    columns = (
        "",
        "TTFT measured, ms (launches)",
        "predicted",
        "error",
        "TPOT measured, ms (launches)",
        "predicted",
        "error",
    )
    return table(columns, rows)


def _name(metric: str) -> str:
    return metric.removesuffix("_s").upper()


def _figure(reports: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the plot: predicted against measured, a row per metric and a column per folder; bars span the launches."""
    with figure_style():
        import matplotlib.pyplot as plt

        size = (3.6 * len(reports), 7.0)
        figure, axes = plt.subplots(2, len(reports), figsize=size, layout="constrained", squeeze=False)
        for column, report in enumerate(reports):
            for row, metric in enumerate(METRICS):
                ax = axes[row][column]
                found = [cell[metric] for cell in report["cells"] if cell[metric]]
                _scatter(ax, found)
                ax.set_xlabel(f"measured {_name(metric)}, ms")
                ax.set_ylabel(f"predicted {_name(metric)}, ms")
                if row == 0:
                    ax.set_title(title(report).replace(": ", ":\n"), fontsize=8)
        return png(figure)


def _scatter(ax: Any, found: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if not found:
        return
    measured = [1e3 * cell["measured"] for cell in found]
    predicted = [1e3 * cell["predicted"] for cell in found]
    spans = [
        [1e3 * (cell["measured"] - cell["low"]) for cell in found],
        [1e3 * (cell["high"] - cell["measured"]) for cell in found],
    ]
    ax.errorbar(measured, predicted, xerr=spans, fmt="o", markersize=3, linewidth=0.8, color="#4477aa")
    limits = [0.8 * min(measured + predicted), 1.25 * max(measured + predicted)]
    ax.plot(limits, limits, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(limits)
    ax.set_ylim(limits)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
