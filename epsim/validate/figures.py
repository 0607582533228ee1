"""The figures of docs/validation.md, drawn from the plain values of the report: `draw_figures` returns PNG bytes.

matplotlib is loaded when a figure is drawn (`epsim.report.figure`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from epsim.report.figure import figure_style, png

METHOD_COLOURS = {"baseline": "#4477aa", "attention-soft": "#cc6633", "gaussian-soft": "#228855"}
BENCHMARK_MARKERS = {"MMMU": "o", "SQA-IMG": "^"}
PART_COLOURS = {
    "attention": "#4477aa",
    "experts": "#228855",
    "host": "#999999",
    "copy": "#66ccee",
    "dispatch": "#cc6633",
    "combine": "#eeaa66",
    "waiting": "#dddddd",
    "KV wait": "#aa3377",
    "vision, router, head": "#eedd88",
}
_OTHER = "vision, router, head"


def draw_figures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the PNG files of the document by name; raises InputError where matplotlib is not installed."""
    with figure_style():
        return {
            "validation-s11.png": png(_scatter(report["s11"])),
            "validation-parts.png": png(_parts(report["s11"]["parts"])),
            "validation-s10.png": png(_ratios(report["s10"])),
        }


def _scatter(s11: Mapping[str, Any]) -> Any:
    """Predicted against published: a column per study, TTFT above TPOT."""
    import matplotlib.pyplot as plt

    panels = [("in sample: all rows fitted", s11["cells"])]
    panels += [(f"held out: {study['title']}", study["cells"]) for study in s11["held_out"]]
    figure, axes = plt.subplots(2, len(panels), figsize=(13, 6.8), layout="constrained")
    for row, (metric, low, high) in enumerate((("ttft", 1.0, 25.0), ("tpot", 0.5, 4.0))):
        for column, (title, cells) in enumerate(panels):
            ax = axes[row][column]
            _points(ax, cells, metric)
            ax.plot([low, high], [low, high], color="black", linewidth=0.8, label="equal")
            _log_axes(ax, low, high, (1, 2, 5, 10, 20) if metric == "ttft" else (0.5, 1, 2, 4))
            ax.set_xlabel(f"published {metric.upper()}, s")
            ax.set_ylabel(f"predicted {metric.upper()}, s")
            if row == 0:
                ax.set_title(title, fontsize=9)
    axes[0][0].legend(loc="upper left", fontsize=8)
    return figure


def _points(ax: Any, cells: Sequence[Mapping[str, Any]], metric: str) -> None:
    for method, colour in METHOD_COLOURS.items():
        for benchmark, marker in BENCHMARK_MARKERS.items():
            own = [cell[metric] for cell in cells if (cell["benchmark"], cell["method"]) == (benchmark, method)]
            if own:
                ax.plot(
                    [cell["published_s"] for cell in own],
                    [cell["predicted_s"] for cell in own],
                    linestyle="none", marker=marker, markersize=6, color=colour,
                    markerfacecolor="none" if method == "baseline" else colour, label=f"{benchmark}, {method}",
                )  # fmt: skip


def _log_axes(ax: Any, low: float, high: float, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for axis, scale, limits in ((ax.xaxis, ax.set_xscale, ax.set_xlim), (ax.yaxis, ax.set_yscale, ax.set_ylim)):
        scale("log")
        limits(low, high)
        axis.set_major_locator(FixedLocator(list(ticks)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_aspect("equal")


def _parts(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Stacked parts by batch size, baseline beside SMoES, with the published total as a marker."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(BENCHMARK_MARKERS), figsize=(12, 7), layout="constrained")
    for column, benchmark in enumerate(BENCHMARK_MARKERS):
        own = [row for row in rows if row["benchmark"] == benchmark]
        for row, metric in enumerate(("ttft", "tpot")):
            ax = axes[row][column]
            _bars(ax, own, metric)
            ax.set_xlabel("batch size (left bar: baseline, right bar, hatched: attention-soft)")
            ax.set_ylabel(f"{metric.upper()}, s")
            ax.set_title(benchmark, fontsize=10)
    axes[0][0].legend(loc="upper left", fontsize=8)
    return figure


def _bars(ax: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    sizes = sorted({row["batch_size"] for row in rows})
    for row in rows:
        is_baseline = row["method"] == "baseline"
        x, top_s = sizes.index(row["batch_size"]) + (-0.2 if is_baseline else 0.2), 0.0
        parts = _shown(row[f"{metric}_parts_s"])
        for name, colour in PART_COLOURS.items():
            ax.bar(
                x, parts[name], 0.36, bottom=top_s, color=colour, edgecolor="white", linewidth=0.3,
                hatch=None if is_baseline else "//",
                label=name if is_baseline and row["batch_size"] == sizes[0] else None,
            )  # fmt: skip
            top_s += parts[name]
        label = "published total" if is_baseline and row["batch_size"] == sizes[0] else None
        ax.plot(
            [x], [row[f"published_{metric}_s"]], linestyle="none", marker="D", markersize=4, color="black", label=label
        )
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])


def _shown(parts_s: Mapping[str, float]) -> dict[str, float]:
    """Return the parts under the names of the legend; what has none there is in the last."""
    shown = {name: parts_s.get(name, 0.0) for name in PART_COLOURS}
    shown[_OTHER] += sum(seconds for name, seconds in parts_s.items() if name not in PART_COLOURS)
    return shown


def _ratios(s10: Mapping[str, Any]) -> Any:
    """Bars of simulated ratios by benchmark and method, with the published ones as markers."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 6), layout="constrained")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in s10["rows"]))
    names = {"P_V+T": "prefill, vision and text", "D_T": "decode"}
    for ax, (way, column) in zip(axes.flat, [(w, c) for w in ("pairs", "tokens") for c in names], strict=True):
        at = s10["columns"].index(f"{column}, {way}")
        for number, row in enumerate(s10["rows"]):
            method = list(METHOD_COLOURS).index(row["method"])
            x = benchmarks.index(row["benchmark"]) + 0.27 * (method - 1)
            first = row["benchmark"] == benchmarks[0]
            ax.bar(
                x, row["simulated"][at], 0.24, color=METHOD_COLOURS[row["method"]],
                label=f"{row['method']}, simulated" if first else None,
            )  # fmt: skip
            label = "published" if number == 0 else None
            ax.plot([x], [row["published"][at]], linestyle="none", marker="D", markersize=4, color="black", label=label)
        ax.set_xticks(range(len(benchmarks)), benchmarks)
        ax.set_ylim(0, 108)
        ax.set_ylabel("transfer ratio, %")
        ax.set_title(f"{names[column]}: {'(token, expert) pairs' if way == 'pairs' else 'tokens (DeDup)'}", fontsize=10)
    axes[0][0].legend(loc="upper right", fontsize=8, ncols=2)
    return figure
